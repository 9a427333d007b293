"""Numbers that change over the steps."""

from __future__ import annotations

import math


def dynamic_guidance(timestep: int, steps: int, peak: float) -> float:
    """CogVideoX's guidance for a training timestep: 1 + peak (1 - cos(pi u^5)) / 2, u = (steps - timestep) / steps.

    Ranges over [1, 1 + peak]. `timestep` runs 999 .. 0 while `steps` is the number of sampling steps, so u goes far
    below zero and the sequence is erratic: an accident that the model's authors kept (zai-org/CogVideo, issue 267).
    DiTCtrl uses it with peak 6 and 50 steps; diffusers computes the same with `use_dynamic_cfg=True`.
    """
    u = (steps - timestep) / steps
    return 1 + peak * ((1 - math.cos(math.pi * u**5)) / 2)
