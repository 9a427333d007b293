"""How a model rotates queries and keys by position (RoFormer, arXiv 2104.09864).

All families rotate the channels 2i and 2i + 1 of a head as one pair, by an angle that is linear in the position. In
CogVideoX, HunyuanVideo, Wan and FLUX a pair belongs to one axis; in Mochi every axis turns every pair, at frequencies
that are learned for each head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from probe.attend import exact_dtype
from probe.entry import index_of, on_device
from probe.layout import Grid, TokenLayout

Band = tuple[Literal["low", "high"], float]
"""The share of each axis's frequencies, from the slowest or from the fastest on."""


@dataclass(frozen=True, eq=False)
class Rope:
    """The rotation of one forward: video rows turn, text rows do not (FLUX's text stands at position 0).

    `frequencies` [3, H or 1, D / 2] are radians per token along t, y and x; `origin` [3] is the position of the first
    video token, in tokens.
    """

    frequencies: Tensor
    origin: Tensor

    def positions(self, layout: TokenLayout) -> Tensor:
        """Where the video tokens stand, float32 [N_video, 3] in tokens along t, y, x."""
        return _cells(layout.grid, self.origin.device) + self.origin

    def angles(self, positions: Tensor, heads: Sequence[int] | None = None) -> Tensor:
        """Radians [H or 1, n, D / 2] at positions [n, 3]; of all heads, or of some."""
        frequencies = self.frequencies.to(positions.device)
        if heads is not None and frequencies.shape[1] > 1:
            frequencies = frequencies[:, index_of(heads, positions.device)]
        t, y, x = (positions[:, axis, None] * frequencies[axis, :, None] for axis in range(3))  # no matmul: no TF32
        return t + y + x

    def turn(self, x: Tensor, delta: Tensor | Sequence[float], heads: Sequence[int] | None = None) -> Tensor:
        """x [H, n, D] as it would be `delta` further on: tokens along t, y, x, of each row [n, 3] or of all (3,).

        `heads` says which heads x holds where it does not hold all. A row that moves by 0 keeps its bits.
        """
        moved = delta if isinstance(delta, Tensor) else on_device(tuple(delta), torch.float32, x.device)
        angles, dtype = self.angles(moved.to(x.device).reshape(-1, 3), heads), exact_dtype(x.dtype)
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        even, odd = x.to(dtype).unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(x.dtype)

    def only(self, axes: Sequence[int] = (0, 1, 2), band: Band | None = None) -> Rope:
        """The part of the rotation that some axes (0 t, 1 y, 2 x) and a band of their frequencies make."""
        part = self.frequencies if band is None else self.frequencies * _within(self.frequencies, *band)
        return replace(self, frequencies=torch.stack([part[axis] * (axis in axes) for axis in range(3)]))


def _within(frequencies: Tensor, side: str, share: float) -> Tensor:
    """Which pairs are in a band, bool [3, H, D / 2]; pairs of another axis have frequency 0 and do not count."""
    own = frequencies != 0
    size = frequencies.abs() if side == "low" else -frequencies.abs()
    rank = size.masked_fill(~own, torch.inf).argsort(-1).argsort(-1)
    return rank < (share * own.sum(-1, keepdim=True)).round()


@lru_cache(maxsize=64)
def by_axis(dims: tuple[int, ...], theta: float, device: torch.device) -> Tensor:
    """Frequencies [3, 1, D / 2] of the stock rotation: the pairs are dealt out to the axes one after the other, `dims`
    channels each, and pair i of d channels has theta^(-2 i / d).
    """
    with torch.inference_mode(False):
        each = [theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim) for dim in dims]
        return torch.block_diag(*each).unsqueeze(1).float().to(device)


@lru_cache(maxsize=64)
def _cells(grid: Grid, device: torch.device) -> Tensor:
    """[N_video, 3]: frame, row and column of each token."""
    with torch.inference_mode(False):
        return torch.cartesian_prod(*(torch.arange(n, device=device, dtype=torch.float32) for n in grid.shape))
