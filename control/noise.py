"""The noise a loop starts from: scaled, repeated over a long video, or renewed where it is fine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from control.adapter import Loop
from control.denoise import State
from control.latent import LatentEdit, Moment
from probe.errors import UsageError


@dataclass(frozen=True)
class Nudge(LatentEdit):
    """The first latents times `factor`; 1.15 before editing a real image (Stable Flow, 2411.14430)."""

    factor: float = 1.15

    def before(self, latents: Tensor, at: Moment) -> Tensor:
        """Scaled at the first step."""
        return latents if at.step else latents * self.factor


@dataclass(frozen=True)
class NoiseShuffle(LatentEdit):
    """Frames beyond a window start from the noise of earlier ones, in another order: a long video whose windows all
    look alike to the model.

    Each group of `stride` latent frames is a shuffled copy of the group `window` frames before it. The order comes from
    `seed` and is the same for every prompt. A video of at most one window keeps its noise.

    Source: FreeNoise (Qiu et al. 2023), window 16 and stride 4.

    Raises:
        UsageError: not 1 <= stride <= window.
    """

    window: int
    stride: int
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.stride <= self.window:
            raise UsageError(
                f"Noise must be shuffled in groups of 1 to {self.window} frames, its window. Got {self.stride}. Take a "
                "quarter of the window."
            )

    def before(self, latents: Tensor, at: Moment) -> Tensor:
        """Shuffled at the first step."""
        return latents if at.step else latents[:, self.order(latents.shape[1])]

    def order(self, frames: int) -> list[int]:
        """For each frame the one of the first window whose noise it has."""
        generator = torch.Generator().manual_seed(self.seed)
        order = list(range(min(frames, self.window)))
        while len(order) < frames:
            group = order[len(order) - self.window :][: self.stride]
            order += [group[i] for i in torch.randperm(self.stride, generator=generator).tolist()]
        return order[:frames]


@dataclass(frozen=True)
class LowPass:
    """A filter over time, rows and columns: `gain` 1 for what changes slowly, 0 for what is fine.

    With f the frequency as a share of the highest one and d^2 = (f_t / c_t)^2 + (f_y / c)^2 + (f_x / c)^2 for the
    cutoffs c_t = `time` and c = `space`: gaussian exp(-d^2 / 2), butterworth 1 / (1 + d^(2 order)).

    Source: FreeInit (Wu et al. 2023), both cutoffs 1/4, order 4.

    Raises:
        UsageError: a cutoff or the order is not above 0.
    """

    time: float = 0.25
    space: float = 0.25
    shape: Literal["gaussian", "butterworth"] = "gaussian"
    order: int = 4

    def __post_init__(self) -> None:
        if not min(self.time, self.space, self.order) > 0:
            raise UsageError(
                f"A low-pass must have cutoffs and an order above 0. Got {self.time}, {self.space} and {self.order}. "
                "Take 0.25, 0.25 and 4."
            )

    def gain(self, frames: int, height: int, width: int) -> Tensor:
        """The gain of each frequency of an FFT over the three axes, float64 [frames, height, width], 0 to 1."""
        axes = zip((frames, height, width), (self.time, self.space, self.space), strict=True)
        f_t, f_y, f_x = (2 * torch.fft.fftfreq(n, dtype=torch.float64) / cutoff for n, cutoff in axes)
        squared = (f_t**2)[:, None, None] + (f_y**2)[:, None] + f_x**2
        return torch.exp(-squared / 2) if self.shape == "gaussian" else 1 / (1 + squared**self.order)

    def mix(self, low: Tensor, high: Tensor) -> Tensor:
        """The slow part of `low` and the fine part of `high`, latents [P, F, C, H, W]."""
        frames, _, height, width = low.shape[1:]
        gain = self.gain(frames, height, width).unsqueeze(1).to(low.device)
        difference = torch.fft.fftn(low.double() - high.double(), dim=(1, 3, 4))
        return (high.double() + torch.fft.ifftn(gain * difference, dim=(1, 3, 4)).real).to(low.dtype)


def renew(loop: Loop, start: State, done: State, low_pass: LowPass, step: int = 1) -> State:
    """A new start, at `step`, for clips that were denoised from the noise of `start` to `done`: what is slow in the
    result with its noise put back, and fresh noise for what is fine. Denoise it again, several times if need be.

    Source: FreeInit (Wu et al. 2023), which starts from the first step of a schedule that does not begin in pure noise.

    Raises:
        UsageError: a step that the run does not have, or one of pure noise (the first of CogVideoX), where nothing of
            the result would be left.
    """
    if not 0 <= step < loop.steps or loop.sigma(step) == 1:
        raise UsageError(
            f"A clip must be renewed at a step where some of it is left, of the {loop.steps} of the run. Got {step}. "
            "Take 1 or a later one."
        )
    loop.generator.set_state(done.generator)
    batch, frames = start.latents.shape[:2]
    fresh = loop.noise(batch, frames, start.latents.dtype) * loop.sigma(step)
    noised = loop.scheduler.add_noise(done.latents, start.latents, loop.scheduler.timesteps[step].expand(batch))
    return State(step, low_pass.mix(noised, fresh), None, loop.generator.get_state())
