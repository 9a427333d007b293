"""Where an edit of a recipe takes tensors from, and which row of them, as `control` takes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from control.bank import Bank
from control.constant import Constant
from control.match import Match
from control.source import Itself, Peer, Source, Stored
from probe.errors import UsageError
from probe.layout import Grid
from probe.site import Branch, Where
from recipes.build_area import Branches
from recipes.context import Context
from recipes.language import source as spec
from recipes.language.operator import Operation


@dataclass(frozen=True)
class _Plain:
    """The unperturbed branch of another prompt: what a perturbed pass takes from is not itself perturbed."""

    prompt: int

    @property
    def __name__(self) -> str:
        return f"prompt {self.prompt}"

    def __call__(self, branch: Branch) -> Branch:
        return replace(branch, prompt=self.prompt, role="plain")


def source_of(given: Any, tensors: str, edit: Operation, context: Context) -> Source:
    """Where an edit takes from; a bank is added to `context.extra`.

    Raises:
        UsageError: a prompt in a run with segments, or a step or layer that the run does not have.
    """
    if isinstance(given, spec.Itself):
        return Itself()
    if isinstance(given, spec.Constant):
        return Constant(given.constant)
    if isinstance(given, spec.Stored):
        return _stored(given, tensors, edit, context)
    if context.segments is not None:
        raise UsageError(
            f"Segments must take from previous_segment. Got prompt {given}, which no segment of the same frames shows. "
            "Leave the segments out, or the source."
        )
    prompt = context.prompt(given)
    return Peer(_Plain(prompt) if context.recipe.guides else prompt)


def _stored(given: spec.Stored, tensors: str, edit: Operation, context: Context) -> Stored:
    """A bank of what the source needs, and of nothing else."""
    at, where = given.stored, context.where(edit)
    for name, value, count in (("step", at.step, context.steps), ("layer", at.layer, context.layers)):
        if value is not None and value >= count:
            raise UsageError(f"stored.{name} must lie in 0 to {count - 1}. Got {value}. Lower it.")
    _refuse_later(at, edit, context)
    prompts = None if at.prompt is None else (context.prompt(at.prompt),)
    bank = Bank(
        tensors,
        Where(
            steps=where.steps if at.step is None else (at.step,),
            layers=where.layers if at.layer is None else (at.layer,),
            branches=where.branches if prompts is None else Branches(prompts),
            kinds=where.kinds,
        ),
    )
    context.extra.append(bank)
    return Stored(bank, at.step, at.layer, None if prompts is None else prompts[0])


def _refuse_later(at: spec.StoredAt, edit: Operation, context: Context) -> None:
    """What an edit takes must be there at its first call; in a perturbed pass the steps are also those of its guide."""
    steps, layers = context.acting(edit), context.span(edit.layers, context.layers, "layers")
    if context.role is not None or not steps:
        return
    step = steps[0] if at.step is None else at.step
    late = {"step": (step, steps[0])}
    if step == steps[0] and at.layer is not None:
        late["layer"] = (at.layer, layers[0] if layers else 0)
    for name, (stored, first) in late.items():
        if stored > first:
            raise UsageError(
                f"stored.{name} must not lie behind the first {name} of its edit, {first}. Got {stored}. Lower it, or "
                f"let the edit begin at {name} {stored}."
            )


def mapping_of(rows: spec.Rows | None, grid: Grid) -> Any:
    """As a Transfer takes it: a number for each video token, -1 where it keeps its own.

    Raises:
        UsageError: a list that does not fit the grid.
    """
    if rows is None:
        return None
    if isinstance(rows, spec.Matched):
        return Match(features=rows.match.features, threshold=rows.match.threshold)
    if isinstance(rows, spec.Moved):
        return moved(grid, rows.move)
    if len(rows) != grid.size or max(rows) >= grid.size:
        raise UsageError(
            f"A mapping must have one source row below {grid.size} for each of {grid.size} video tokens. Got "
            f"{len(rows)}{f' up to {max(rows)}' if rows else ''}. Number them as the grid {grid}, frame by frame."
        )
    return np.array(rows)


def moved(grid: Grid, by: Sequence[int]) -> np.ndarray:
    """For each token of a grid the one `by` (frames, rows, columns) further, -1 outside; [frames, height, width]."""
    numbers = np.pad(np.arange(grid.size).reshape(grid.shape), [(n, n) for n in grid.shape], constant_values=-1)
    starts = [min(max(n + move, 0), 2 * n) for n, move in zip(grid.shape, by, strict=True)]
    return numbers[tuple(slice(start, start + n) for start, n in zip(starts, grid.shape, strict=True))]
