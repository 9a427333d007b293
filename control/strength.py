"""How much of an edit is applied, step by step. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from probe.errors import UsageError

Strength = float | Callable[[float], float]
"""A number, or a function of the progress k / K of step k of K, from 0 (pure noise) to 1."""


def strength_at(strength: Strength, step: int, steps: int) -> float:
    """The strength of a step.

    Raises:
        UsageError: it is no finite number.
    """
    found = float(strength(step / steps)) if callable(strength) else float(strength)
    if not math.isfinite(found):
        raise UsageError(
            f"A strength must be a finite number. Got {found:g} at step {step} of {steps}. 1 is all of it."
        )
    return found


@dataclass(frozen=True)
class Ramp:
    """From `first` to `last` while the progress goes from `start` to `stop`; constant before and after.

    `shape`: linear, cosine (half a period) or step (`last` from `stop` on).

    Raises:
        UsageError: not 0 <= start <= stop <= 1.
    """

    first: float
    last: float
    start: float = 0.0
    stop: float = 1.0
    shape: Literal["linear", "cosine", "step"] = "linear"

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop <= 1:
            raise UsageError(
                f"A ramp must satisfy 0 <= start <= stop <= 1. Got {self.start} to {self.stop}. Give shares of the run."
            )

    def __call__(self, progress: float) -> float:
        """The strength at a progress of 0 to 1."""
        if progress >= self.stop:
            return self.last
        if progress <= self.start or self.shape == "step":
            return self.first
        way = (progress - self.start) / (self.stop - self.start)
        if self.shape == "cosine":
            way = (1 - math.cos(math.pi * way)) / 2
        return self.first + (self.last - self.first) * way
