"""Two runs, and where they can be compared: steps of the same timestep, layers that both recorded. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from probe.errors import UsageError
from probe.store import Run

Array = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Pair:
    """Runs A and B, the steps (of A, of B) and layers they share, and lines about what only one of them has.

    `layers_of` are all layers of each. `whole` says that the shared steps are all that both recorded, alike in kind.
    `segment` None is the whole video for maps and the first segment for everything else.
    """

    a: Run
    b: Run
    steps: tuple[tuple[int, int], ...]
    layers: tuple[int, ...]
    layers_of: dict[Run, tuple[int, ...]]
    whole: bool
    segment: int | None
    left_out: tuple[str, ...]

    def read_layers(self, one: Callable[[Run, int | None, int | None], Array]) -> tuple[Array, Array]:
        """Means over the shared steps and layers of `one(run, step, layer)`, in which None is the mean of all."""
        layers = (None,) if all(layers == self.layers for layers in self.layers_of.values()) else self.layers
        steps = ((None, None),) if self.whole else self.steps
        return self._read(lambda run, step: np.mean([one(run, step, layer) for layer in layers], 0), steps)

    def read_heads(self, one: Callable[[Run, Any], Array]) -> tuple[Array, Array]:
        """Means over the shared steps of `one(run, step)` [every layer, H, ...], at the shared layers: [L, H, ...]."""

        def chosen(run: Run, step: int | None) -> Array:
            grid, layers = one(run, step), self.layers_of[run]
            if len(grid) != len(layers):
                raise UsageError(f"A step must hold every layer. Got {len(grid)} of {len(layers)}. Record it anew.")
            return grid[[layers.index(layer) for layer in self.layers]]

        return self._read(chosen, self.steps)

    def _read(
        self, one: Callable[[Run, int | None], Array], steps: Iterable[tuple[int | None, int | None]]
    ) -> tuple[Array, Array]:
        """Means over the steps of `one(run, step)`, of A and of B; a number that one of them does not define at a step
        is left out of both there, and is NaN where no step defines it.

        Raises:
            UsageError: no step has it in both, or its shapes differ.
        """
        found, missing = [], UsageError("Two runs must share a step to be compared. Got none. Choose another run.")
        for of_a, of_b in steps:
            try:
                found.append((one(self.a, of_a), one(self.b, of_b)))
            except UsageError as error:  # not recorded there
                missing = error
        if not found:
            raise missing
        a, b = (np.stack(side) for side in zip(*found, strict=True))
        if a.shape != b.shape:
            grids = " and ".join("x".join(map(str, side.shape[1:])) for side in (a, b))
            raise UsageError(
                f"Both runs must have one shape. Got {grids}. Choose a --segment or a run of the same size."
            )
        both = np.isfinite(a) & np.isfinite(b)
        count = np.where(both.any(0), both.sum(0), np.nan)
        return np.where(both, a, 0).sum(0, dtype=float) / count, np.where(both, b, 0).sum(0, dtype=float) / count


def pair(a: Run, b: Run, step: int | None = None, layer: int | None = None, segment: int | None = None) -> Pair:
    """Where two runs can be compared.

    Runs with different numbers of steps are at different noise in the step of one number, so steps are paired by their
    timestep, unless one is asked for by its number.

    Raises:
        UsageError: they share no step or no layer, or not the one asked for.
    """
    kept_a, kept_b = _kept(a), _kept(b)
    at_a, at_b = ({run.step_attrs(i).get("timestep", i): i for i in kept} for run, kept in ((a, kept_a), (b, kept_b)))
    steps = tuple((i, at_b[time]) for time, i in at_a.items() if time in at_b)
    whole = len(steps) == len(kept_a) == len(kept_b) and all(kept_a[i] == kept_b[j] for i, j in steps)
    of_a, of_b = a.layers, b.layers
    layers = tuple(layer for layer in of_a if layer in of_b)
    left_out = () if step is not None else only("timesteps", at_a, at_b)
    left_out += () if layer is not None else only("layers", of_a, of_b)
    if step is not None:
        _check("step", step, [i for i in kept_a if i in kept_b])
        steps, whole = ((step, step),), False
    if layer is not None:
        _check("layer", layer, layers)
        layers = (layer,)
    if not steps or not layers:
        raise UsageError(
            "Two runs must share a recorded layer and the timestep of a step to be compared. Got "
            f"{'; '.join(left_out) or 'no recorded attention'}. Choose another run, or a --step by its number."
        )
    return Pair(a, b, steps, layers, {a: of_a, b: of_b}, whole, segment, left_out)


def only(thing: str, a: Iterable[Any], b: Iterable[Any]) -> tuple[str, ...]:
    """A line for each of two runs that has something alone."""
    a, b = list(a), list(b)
    alone = {"A": [str(one) for one in a if one not in b], "B": [str(one) for one in b if one not in a]}
    return tuple(f"{thing} only in {name}: {', '.join(left)}" for name, left in alone.items() if left)


def _kept(run: Run) -> dict[int, set[str]]:
    """The steps at which anything of the attention was recorded, and the kinds of arrays there."""
    segments = {step: run.index.head(step).segments.values() for step in run.steps}
    return {step: {name for one in found for name in one.heads} for step, found in segments.items() if found}


def _check(thing: str, asked: int, common: Iterable[int]) -> None:
    common = list(common)
    if asked not in common:
        both = ", ".join(str(one) for one in common) or "none"
        raise UsageError(f"A {thing} to compare must be recorded in both runs. Got {asked}. Both have: {both}.")
