"""Changes of the latents between denoising steps, and the blend of two clips by a mask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from control.adapter import Loop
from control.address import Found, Rest
from control.extract import ExtractMask
from probe.errors import LayoutError, UsageError
from probe.layout import TokenLayout
from probe.models.cogvideox import layout_of
from probe.region import Region
from probe.site import Span, chosen
from probe.word import Prompt

Mask = Found | Region | Tensor | NDArray[np.generic]
"""What is inside: an extracted mask or its rest, a region of video tokens, or numbers in [0, 1] on the token grid
[F, Y, X] or on the latent pixels [F, H, W]."""


@dataclass(frozen=True)
class Moment:
    """Where the loop is: its step, 0 for pure noise, and the prompts it was told."""

    loop: Loop
    step: int
    prompts: tuple[Prompt, ...] = ()

    @property
    def steps(self) -> int:
        """Steps of the run."""
        return self.loop.steps

    @property
    def sigma(self) -> float:
        """Noise level at the start of the step, 0 to 1."""
        return self.loop.sigma(self.step)


class LatentEdit:
    """A change of the latents [P, F, C, H, W] of a loop, handed to `denoise`. Both functions return the latents to go
    on with, of the same shape, and never write into those given; as they are here they return them as they came.
    """

    def before(self, latents: Tensor, at: Moment) -> Tensor:
        """The latents the step predicts from."""
        return latents

    def after(self, latents: Tensor, at: Moment) -> Tensor:
        """The latents the step ends with."""
        return latents


@dataclass(frozen=True, eq=False)
class Blend(LatentEdit):
    """After a step, what lies outside of the mask is taken from the source: x = x_src + M (x - x_src).

    `source` is a prompt of the batch, or a function from a number of finished steps to latents [F, C, H, W] (those of
    an inversion); `target` the prompt changed. `mask` is 1 where the target keeps its own; of several masks the largest
    value counts (prompt-to-prompt joins the words of both prompts). Token masks are spread over the latent pixels of
    each patch. An extracted mask is the target's unless it names a source of its own; while it is not known, and in
    steps that `steps` leaves out, nothing changes. M = 0 and M = 1 are exact.

    Source: local blend of prompt-to-prompt (Hertz et al. 2022); KV-Edit (2502.17363); Shin et al. (2508.07519).
    """

    source: int | Callable[[int], Tensor]
    target: int
    mask: Mask | tuple[Mask, ...]
    steps: Span = None

    def after(self, latents: Tensor, at: Moment) -> Tensor:
        """The latents with the target blended.

        Raises:
            UsageError: a prompt the batch does not have, or a mask of another kind.
            LayoutError: a mask of another shape.
        """
        weights = self._weights(latents, at) if at.step in chosen(self.steps, at.steps) else None
        if weights is None:
            return latents
        for prompt in {self.source, self.target}:
            if isinstance(prompt, int):
                chosen(prompt, len(latents))
        source = latents[self.source] if isinstance(self.source, int) else self.source(at.step + 1)
        blended = latents.clone()
        blended[self.target] = torch.lerp(source.to(latents), latents[self.target], weights)
        return blended

    def _weights(self, latents: Tensor, at: Moment) -> Tensor | None:
        """M for the latents of one prompt, [F, 1, H, W]; None while a mask is not known."""
        masks = self.mask if isinstance(self.mask, tuple) else [self.mask]
        known = [self._values(mask, latents, at) for mask in masks]
        if any(values is None for values in known):
            return None
        frames, _, height, width = latents.shape[1:]
        spread = [_spread(values, (frames, height, width)) for values in known if values is not None]
        return torch.stack(spread).amax(0).unsqueeze(1).to(latents)

    def _values(self, mask: Mask, latents: Tensor, at: Moment) -> Tensor | None:
        """A mask on its own grid."""
        if isinstance(mask, Rest):
            values = self._values(mask.area, latents, at)
            return None if values is None else 1 - values
        if isinstance(mask, ExtractMask):
            return None if (found := mask.values(self.target)) is None else torch.as_tensor(found, dtype=torch.float32)
        frames, _, height, width = latents.shape[1:]
        layout = layout_of(at.loop.config, frames, height, width, 0)
        if isinstance(mask, Region):
            return torch.from_numpy(_video_of(mask, layout)).float()
        if isinstance(mask, Found):
            raise UsageError(f"A Blend must have a mask of the whole step. Got {mask}. Use an ExtractMask or a region.")
        if tuple(mask.shape) not in (layout.grid.shape, (frames, height, width)):
            raise LayoutError(
                f"A mask must lie on the token grid {layout.grid.shape} or on the latent pixels "
                f"{(frames, height, width)}. Got {tuple(mask.shape)}. Resize it with probe.mask.resize."
            )
        return torch.as_tensor(mask).float()


def _video_of(region: Region, layout: TokenLayout) -> NDArray[np.bool_]:
    """The region as a mask [F, Y, X]."""
    inside = region.mask(layout)
    if not inside.any():
        raise UsageError(
            f"A Blend must have a mask with video tokens. Got {region}, which has none. Use a box, or frames."
        )
    return inside.reshape(layout.grid.shape)


def _spread(values: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Each patch's value on all of its latent pixels."""
    for axis, size in enumerate(shape):
        values = values.repeat_interleave(-(-size // values.shape[axis]), axis).narrow(axis, 0, size)
    return values
