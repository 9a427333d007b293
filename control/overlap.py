"""A long latent in overlapping windows: each predicted by itself, and the predictions averaged where they overlap."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from probe.errors import UsageError

Shape = Literal["uniform", "triangular"]


def starts_of(frames: int, length: int, stride: int) -> tuple[int, ...]:
    """First frames of the windows of `length` that cover `frames` latent frames, one every `stride`; the last one ends
    with the video.

    Raises:
        UsageError: windows that leave frames out, or do not fit.
    """
    if not 1 <= stride <= length <= frames:
        raise UsageError(
            f"Windows must satisfy 1 <= stride <= length <= frames. Got stride {stride}, length {length} and {frames} "
            "frames. Shorten the windows or their stride."
        )
    return (*range(0, frames - length, stride), frames - length)


def weights_of(length: int, shape: Shape) -> Tensor:
    """The weight of each frame of a window before division by their sum, float64 [length]: all 1, or 1, 2, .. up to the
    middle and down again (FreeNoise).
    """
    rising = torch.arange(1, length + 1, dtype=torch.float64)
    return torch.ones_like(rising) if shape == "uniform" else torch.minimum(rising, rising.flip(0))


def average(frames: int, parts: Sequence[tuple[int, Tensor, Tensor]]) -> Tensor:
    """The weighted mean [P, frames, ...] of what covers each frame, from (first frame, weights [T], prediction
    [P, T, ...]) of windows. A frame that one window covers keeps its bits.

    Raises:
        UsageError: a frame that no window covers.
    """
    total = torch.zeros(frames, dtype=torch.float64)
    for start, weights, _ in parts:
        total[start : start + len(weights)] += weights
    if not (total > 0).all():
        bare = (total <= 0).nonzero().flatten().tolist()
        raise UsageError(f"Windows must cover every frame. Got none for {bare}. Add windows, or shorten their stride.")
    first = parts[0][2]
    mean = first.new_zeros((len(first), frames, *first.shape[2:]))
    for start, weights, prediction in parts:
        place = slice(start, start + len(weights))
        share = (weights / total[place]).to(prediction)
        mean[:, place] += prediction * share.view(-1, *[1] * (prediction.dim() - 2))
    return mean


@dataclass(frozen=True)
class Windows:
    """The prediction of a long latent [P, F, C, H, W] from windows of `length` frames that begin at `starts`.

    `predict` gets all windows as one batch [windows * P, length, C, H, W], window by window, and the step: a
    `Lockstep` with one text per window (and `shown` naming the prompts) gives each part of the video its own prompt.

    Source: Gen-L-Video (Wang et al. 2023), uniform; FreeNoise (Qiu et al. 2023), triangular.
    """

    predict: Callable[[Tensor, int], Tensor]
    starts: tuple[int, ...]
    length: int
    shape: Shape = "triangular"

    def __call__(self, latents: Tensor, step: int) -> Tensor:
        """The averaged model output, of the shape of the latents."""
        clips = torch.cat([latents[:, start : start + self.length] for start in self.starts])
        parts = self.predict(clips, step).chunk(len(self.starts))
        weights = weights_of(self.length, self.shape)
        return average(
            latents.shape[1], [(start, weights, part) for start, part in zip(self.starts, parts, strict=True)]
        )
