"""Filter: which frequencies over frames, rows and columns the video keeps; and the frequency blend of two tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from control.address import Area
from control.edit import Edit
from control.shift import touched, video_rows
from probe.attend import exact_dtype
from probe.block import Later
from probe.call import AttentionCall
from probe.entry import index_of
from probe.errors import UsageError
from probe.plan import Stage
from probe.region import video

AXES = "tyx"

Cutoff = float | Sequence[float]
"""Frequency of the Gaussian, one for all axes or one for each; 1 is the highest of an axis (Nyquist)."""


@dataclass(eq=False)
class Filter(Edit):
    """The video of X passes a Gaussian filter over some axes of the token grid.

    X is "o", the output of the attention before its projection, or "h", the hidden states that the block gives. The low
    pass is g = exp(-1/2 sum_a (f_a / c_a)^2), f = 2 |fftfreq| from 0 to 1 along each of `axes` ("tyx"), c the `cutoff`.
    `keep` "low" multiplies frequencies by g + gain (1 - g), "high" by (1 - g) + gain g: what does not pass is scaled by
    `gain`, 0 by default; 1 changes nothing. The strength goes from the plain X to the filtered one. Clips are periodic,
    as for any FFT.

    Raises:
        UsageError: another tensor, axis or side, a cutoff that is not above 0, heads of h, rows of text.
    """

    tensor: Literal["o", "h"]
    axes: str = AXES
    cutoff: Cutoff = 0.25
    keep: Literal["low", "high"] = "low"
    gain: float = 0.0
    rows: Area | None = field(default_factory=video, kw_only=True)
    stage: Stage = field(default=Stage.MERGE, kw_only=True)
    rank = 5

    def __post_init__(self) -> None:
        _cutoffs(self.axes, self.cutoff)
        if self.keep not in ("low", "high"):
            raise UsageError(f"A Filter must keep 'low' or 'high'. Got {self.keep!r}.")
        self.touches = touched(self, self.tensor)

    def __str__(self) -> str:
        return f"Filter({self.tensor} {self.keep} {self.axes})"

    def apply(self, call: AttentionCall, entry: int, amount: float) -> None:
        """Filter the video of one batch entry, now or when the block returns."""
        if self.gain == 1:
            return
        rows, grid = video_rows(self.rows, call, entry).unsqueeze(-1), call.layout.grid

        def filtered(x: Tensor) -> Tensor:
            passed = self.filtered(x.unflatten(-2, grid.shape)).flatten(-4, -2)
            return torch.where(rows, torch.lerp(x, passed, amount), x)

        if self.tensor == "h":
            call.later.append(Later("block", entry, lambda _, made: made.on_video(filtered), by=self))
            return
        out, heads, video_slice = call.writable("out"), index_of(self.heads(call), call.q.device), call.rows.video_slice
        out[entry, heads, video_slice] = filtered(out[entry, heads][:, video_slice])

    def filtered(self, x: Tensor) -> Tensor:
        """x [..., frames, height, width, C], in its dtype."""
        low = low_pass(x.to(exact_dtype(x.dtype)), self.cutoff, self.axes)
        rest = x - low
        kept, other = (low, rest) if self.keep == "low" else (rest, low)
        return (kept + self.gain * other).to(x.dtype)


def low_pass(x: Tensor, cutoff: Cutoff = 0.25, axes: str = AXES) -> Tensor:
    """The Gaussian low pass of x [..., frames, height, width, C] over some of t, y, x.

    Raises:
        UsageError: unknown axes, or a cutoff that is not above 0.
    """
    cutoffs = _cutoffs(axes, cutoff)
    dims, precise = [AXES.index(axis) - 4 for axis in axes], x.to(exact_dtype(x.dtype))
    spectrum = torch.fft.fftn(precise, dim=dims)
    for dim, end in zip(dims, cutoffs, strict=True):
        frequency = 2 * torch.fft.fftfreq(x.shape[dim], device=x.device, dtype=precise.dtype)
        spectrum = spectrum * torch.exp(-0.5 * (frequency / end) ** 2).view(-1, *[1] * (-dim - 1))
    return torch.fft.ifftn(spectrum, dim=dims).real.to(x.dtype)


def blend_frequencies(whole: Tensor, local: Tensor, cutoff: Cutoff = 0.25, axes: str = AXES) -> Tensor:
    """The low frequencies of `whole` with the high ones of `local`, both [..., frames, height, width, C] (FreeLong,
    arXiv 2407.19918: attention over all frames, and over a window of them; its cutoffs are 0.25).
    """
    precise = local.to(exact_dtype(local.dtype))
    return (precise + low_pass(whole.to(precise) - precise, cutoff, axes)).to(local.dtype)


def _cutoffs(axes: str, cutoff: Cutoff) -> tuple[float, ...]:
    """One for each axis."""
    if not axes or set(axes) - set(AXES) or len(set(axes)) < len(axes):
        raise UsageError(f"The axes of a filter must be some of t, y and x. Got {axes!r}.")
    each = tuple(cutoff) if isinstance(cutoff, Sequence) else (cutoff,) * len(axes)
    if len(each) != len(axes) or min(each) <= 0:
        raise UsageError(f"A filter must have one cutoff above 0, or one for each of its axes. Got {cutoff}.")
    return each
