"""Region maps: parts of the attention matrix. Text on text, a frame on itself, a patch on itself in time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from probe import attend
from probe.entry import Entry, Place
from probe.errors import UsageError
from probe.layout import TokenLayout
from probe.readout.base import Readout
from probe.site import JOINT

_CHUNK = 512  # rows whose weights are held at a time
_SELF = JOINT | {"self"}


@dataclass(eq=False)
class RegionMap(Readout):
    """p_ij of some rows i and some keys j, the softmax joint over all keys, so that a row sums to at most one.

    The mean over heads; `per_head` keeps heads apart. After a run `values[at]` is float32 [heads or 1, rows, F, Y, X]:
    what each row gives to the keys of the part, which lie on a grid (a text is a line). No N x N matrix: only these
    rows are computed, in chunks, with the row normaliser of the call.

    Relative error 5e-6 in float32, 2e-2 in half precision. A step file keeps them in one byte, see
    `probe.store_record`. Source: the figures of DiTCtrl (Cai et al. 2024, arXiv 2412.18597), whose code forms the whole
    matrix of every layer and step.
    """

    per_head: bool = field(default=False, kw_only=True)

    def facts(self, layout: TokenLayout) -> dict[str, Any]:
        """What a step file says beside the values: whether `heads` are "mean" or "each"."""
        return {"heads": "each" if self.per_head else "mean"}

    def _mean(self, made: Tensor) -> Tensor:
        """[heads or 1, ...] of [H, ...]."""
        return made if self.per_head else made.mean(0, keepdim=True)


@dataclass(eq=False)
class TextMap(RegionMap):
    """What each text token gives to each text token, [heads or 1, T, 1, 1, T], padding that may be seen included.

    Not where text and video attend apart (Wan): text does not attend there. 1.5 MB per step of CogVideoX-2B (30 layers,
    226 tokens, mean of heads).
    """

    kinds = JOINT
    stored = "text_text"

    def reduce(self, entry: Entry) -> Tensor:
        """[heads or 1, T, 1, 1, T]."""
        seen = entry.columns.text_slice
        start = entry.rows.text_slice.start
        made = _by_rows(lambda rows: self._mean(entry.weights(rows, seen)), slice(start, start + entry.columns.text))
        return made[:, :, None, None]

    def cost(self, layout: TokenLayout) -> float:
        """The text columns of the text rows."""
        return (layout.text / layout.total) ** 2


@dataclass(eq=False)
class SpatialMap(RegionMap):
    """What each patch of one token frame gives to each patch of the same frame, [heads or 1, Y X, 1, Y, X].

    `frame` counts token frames from 0; None is the middle one, F // 2, which the authors of DiTCtrl draw. 55 MB per
    step of CogVideoX-2B (30 layers, 1350 patches, mean of heads), 1.6 GB with heads apart: record few steps.

    Raises:
        UsageError: a negative frame.
        LayoutError: during the run, a frame that the video does not have.
    """

    frame: int | None = field(default=None, kw_only=True)

    kinds = _SELF
    stored = "spatial"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.frame is not None and self.frame < 0:
            raise UsageError(f"The frame of a spatial map must be 0 or more. Got {self.frame}. Count token frames.")

    def reduce(self, entry: Entry) -> Tensor:
        """[heads or 1, Y X, 1, Y, X]."""
        frame, grid = self._frame(entry.columns), entry.columns.grid
        seen = entry.columns.frame_slice(frame)
        made = _by_rows(lambda rows: self._mean(entry.weights(rows, seen)), entry.rows.frame_slice(frame))
        return made.unflatten(-1, (1, grid.height, grid.width))

    def facts(self, layout: TokenLayout) -> dict[str, Any]:
        """As of every region map, and the `frame`."""
        return super().facts(layout) | {"frame": self._frame(layout)}

    def cost(self, layout: TokenLayout) -> float:
        """One frame on itself."""
        return (layout.grid.patches / layout.total) ** 2

    def _frame(self, layout: TokenLayout) -> int:
        return layout.grid.frames // 2 if self.frame is None else self.frame


@dataclass(eq=False)
class TemporalMap(RegionMap):
    """What each patch gives to the patch at its own place in every frame, [heads or 1, F, F, Y, X].

    `[:, :, :, y, x]` is frame by frame at one place; rows are the frames that look.

    The authors of DiTCtrl keep one place, the middle; all of them cost as little. 6.8 MB per step of CogVideoX-2B (30
    layers, 13 frames, 1350 places, mean of heads). One frame (a picture) works.
    """

    kinds = _SELF
    stored = "temporal"

    def reduce(self, entry: Entry) -> Tensor:
        """[heads or 1, F, F, Y, X]."""
        made = torch.stack([_in_time(entry, head) for head in range(len(entry.q))])
        return self._mean(made).unflatten(-1, entry.columns.grid.shape[1:])

    def cost(self, layout: TokenLayout) -> float:
        """Frames by frames at every place."""
        return layout.grid.frames * layout.grid.size / layout.total**2


def _in_time(entry: Entry, head: int) -> Tensor:
    """[F, F, Y X] of one head: a thin product of frames by frames per place."""
    frames, video = entry.columns.grid.frames, entry.rows.video_slice
    q, lse = (x[head, video].unflatten(0, (frames, -1)).transpose(0, 1) for x in (entry.q, entry.lse))
    k = entry.k[head, entry.columns.video_slice].unflatten(0, (frames, -1)).transpose(0, 1)
    return attend.probabilities(q, k, lse, entry.scale).movedim(0, -1)


def _by_rows(weights: Callable[[Place], Tensor], rows: slice) -> Tensor:
    """Weights of `rows`, some rows at a time."""
    starts = range(rows.start, rows.stop, _CHUNK)
    return torch.cat([weights(slice(start, min(start + _CHUNK, rows.stop))) for start in starts], 1)
