"""Sums of maps over the calls of a run, kept so that an edit can be shown those of the steps before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Within = Literal["run", "step"]
"""Which maps count: of all steps before, or of the running step so far."""


@dataclass(eq=False)
class Tally:
    """Maps summed: those of the newest step, and those of the steps before. `made` is room for what was made of them,
    with the (step, count) of that time.
    """

    step: int = -1
    before: Tensor | float = 0.0
    newest: Tensor | float = 0.0
    counts: tuple[int, int] = (0, 0)
    made: tuple[tuple[int, int], Tensor] | None = None

    def add(self, maps: Tensor, step: int) -> None:
        """One call's maps."""
        if step != self.step:
            self.step, self.before, self.newest = step, self.before + self.newest, 0.0
            self.counts = (sum(self.counts), 0)
        self.newest, self.counts = self.newest + maps, (self.counts[0], self.counts[1] + 1)

    def upto(self, within: Within, step: int | None = None) -> tuple[int, Tensor | float]:
        """Number and sum of the maps that count at a call of `step`, of all for None."""
        if within == "step":
            return (self.counts[1], self.newest) if step in (None, self.step) else (0, 0.0)
        if step == self.step:
            return self.counts[0], self.before
        return sum(self.counts), self.before + self.newest
