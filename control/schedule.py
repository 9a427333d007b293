"""Numbers of the schedule: what changes over the steps, and which counts it allows. No torch."""

from __future__ import annotations

import math

from probe.errors import UsageError


def dynamic_guidance(timestep: int, steps: int, peak: float) -> float:
    """CogVideoX's guidance for a training timestep: 1 + peak (1 - cos(pi u^5)) / 2, u = (steps - timestep) / steps.

    Ranges over [1, 1 + peak]. `timestep` runs 999 .. 0 while `steps` is the number of sampling steps, so u goes far
    below zero and the sequence is erratic: an accident that the model's authors kept, as they say in their repository.
    DiTCtrl uses it with peak 6 and 50 steps; diffusers computes the same with `use_dynamic_cfg=True`.
    """
    u = (steps - timestep) / steps
    return 1 + peak * ((1 - math.cos(math.pi * u**5)) / 2)


def refuse_steps(steps: int, train: int = 1000) -> None:
    """CogVideoX's schedulers find the previous timestep as t - train // steps: the count must divide `train`.

    Raises:
        UsageError: it does not; names the nearest that does.
    """
    if not 1 <= steps <= train or train % steps:
        nearest = min((n for n in range(1, train + 1) if train % n == 0), key=lambda n: abs(n - steps))
        raise UsageError(
            f"The number of steps must divide {train}, or the scheduler misses its last timestep. Got {steps}. Take "
            f"{nearest}."
        )
