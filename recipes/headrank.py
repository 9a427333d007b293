"""Heads of a recorded run that stand out by several metrics at once, with a control group. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from control.search import Head, head_candidates
from probe.errors import UsageError
from probe.store import Run


def weights_of(run: Run, given: Sequence[str]) -> dict[str, float]:
    """The weight of each metric from texts "name" or "name=weight", 1 where it is left out.

    Raises:
        UsageError: a metric that was not recorded, or a weight that is no number.
    """
    weights = {}
    for text in given:
        name, _, weight = text.partition("=")
        if name not in run.metrics:
            there = ", ".join(run.metrics) or "none; record some with record.readouts"
            raise UsageError(f"A metric must have been recorded. Got {name}. There are {there}.")
        try:
            weights[name] = float(weight or 1)
        except ValueError:
            raise UsageError(f"A metric must come as name or name=weight. Got {text}. Write {name}=-1.") from None
    return weights


def ranked(
    run: Run,
    weights: Mapping[str, float],
    count: int,
    control: Literal["lowest", "random"] = "lowest",
    seed: int = 0,
    step: int | None = None,
    segment: int = 0,
) -> dict[str, Any]:
    """The `count` heads with the highest weighted sum of z-scores and as many to compare with, as [layer, head].

    A metric is its mean over the recorded steps, or that of one `step`; z-scores are over all recorded heads.

    Raises:
        UsageError: a step that was not recorded, or too few heads; see `control.search.head_candidates`.
    """
    metrics = {name: _grid(run, name, step, segment) for name in weights}
    found = head_candidates(metrics, count, weights, control, seed)

    def told(group: Sequence[Head]) -> list[list[int]]:
        return [[run.layers[row], head] for row, head in group]

    def row(group: str, place: Head) -> dict[str, Any]:
        at = {"group": group, "layer": run.layers[place[0]], "head": place[1], "z": float(found.scores[place])}
        return at | {name: float(grid[place]) for name, grid in metrics.items()}

    return {
        "weights": dict(weights),
        "candidates": told(found.heads),
        "control": told(found.control),
        "heads": [row(name, at) for name, some in _groups(found.heads, found.control) for at in some],
    }


def rows(found: Mapping[str, Any]) -> list[dict[str, str]]:
    """One line per head of both groups, for tables."""
    return [
        {name: f"{value:.4g}" if isinstance(value, float) else str(value) for name, value in one.items()}
        for one in found["heads"]
    ]


def _groups(chosen: Sequence[Head], control: Sequence[Head]) -> tuple[tuple[str, Sequence[Head]], ...]:
    return ("candidate", chosen), ("control", control)


def _grid(run: Run, name: str, step: int | None, segment: int) -> NDArray[np.float64]:
    """[layers, heads], mean over the steps where it is defined; NaN where it never is.

    Raises:
        UsageError: it is defined nowhere, or the step was not recorded.
    """
    steps = run.steps if step is None else (step,)
    grids = np.array([run.metric_grid(name, one, segment) for one in steps], np.float64)
    known = np.isfinite(grids)
    if not known.any():
        raise UsageError(f"A metric must be defined in some head. Got {name}, defined in none. Choose another.")
    total = np.where(known, grids, 0).sum(0)
    return np.divide(total, known.sum(0), out=np.full(total.shape, np.nan), where=known.any(0))
