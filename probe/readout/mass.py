"""Region mass: how the attention of text, padding and video rows is shared among text, padding, its own frame and
other frames.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from probe import attend
from probe.entry import Entry, Place
from probe.layout import TokenLayout
from probe.readout.base import Readout, group_means
from probe.site import JOINT

ROWS = ("text", "padding", "video")
COLUMNS = ("text", "padding", "video_same_frame", "video_other_frames")

_METRICS = {
    "video_to_text": ("video", "text", "the text"),
    "video_to_padding": ("video", "padding", "the padding"),
    "video_to_same_frame": ("video", "video_same_frame", "their own frame"),
    "video_to_other_frames": ("video", "video_other_frames", "the other frames"),
    "text_to_text": ("text", "text", "the text"),
    "text_to_padding": ("text", "padding", "the padding"),
    "text_to_video": ("text", "video_other_frames", "the video"),
}


@dataclass(eq=False)
class RegionMass(Readout):
    """`mass(R, C)`: mean over rows of R of the probability that falls on columns C. Each row sums to one.

    Rows and columns are ROWS x COLUMNS, joint over all keys. Text rows have no frame of their own: all their video mass
    counts as other frames. A row group without tokens (a prompt that fills the whole text length has no padding; cross
    attention has video rows only) is NaN. The mass of a key set S is exp(lse_S - lse): exact, by thin products for text
    and padding and one batch of small attentions for each frame on itself; other frames are the remainder.
    `probe.measure.enrichment` makes lift of it.

    After a run `values[at]` is float32 [H, 3, 4]. Where text and video attend apart (Wan), this is the cross attention:
    text and padding share all of it. Conditional branches only. Error: 5e-6 in float32, 1e-4 in half precision.
    """

    kinds = JOINT | {"cross"}
    in_parts = True
    stored = "mass"
    definitions: ClassVar[dict[str, str]] = {
        name: f"mean mass of {rows} rows on {columns}, 0 to 1" for name, (rows, _, columns) in _METRICS.items()
    }

    def reduce(self, entry: Entry) -> Tensor:
        """[H, 3, 4]."""
        text, padding = (_mass_on(entry, entry.column_groups[name]) for name in ("text", "padding"))
        same = same_frame(entry)
        rest = entry.row_sums - text - padding - same
        other = rest.clamp_min(0) if entry.columns.frames else torch.zeros_like(text)
        return group_means(torch.stack([text, padding, same, other], -1), entry.groups, ROWS)

    def metrics(self, value: Any) -> dict[str, NDArray[np.float32]]:
        """Numbers per head [H]; see `definitions`."""
        return {
            name: value[:, ROWS.index(rows), COLUMNS.index(columns)] for name, (rows, columns, _) in _METRICS.items()
        }

    def cost(self, layout: TokenLayout) -> float:
        """The text columns, and each frame against itself."""
        return layout.text / layout.total + layout.grid.size * layout.grid.patches / layout.total**2


_FEW = 64
"""Columns up to which a thin product beats an attention over them."""


def _mass_on(entry: Entry, columns: Place) -> Tensor:
    """Probability each row puts on some columns, [H, N]."""
    count = columns.stop - columns.start if isinstance(columns, slice) else len(columns)
    if count <= _FEW:
        return entry.weights(columns=columns).sum(-1)
    return torch.exp(entry.part(columns) - entry.lse)


def same_frame(entry: Entry) -> Tensor:
    """Probability each video row puts on its own frame, [H, N]; 0 for text rows. All frames in one batch of small
    attentions.
    """
    same, rows, columns = torch.zeros_like(entry.lse), entry.rows, entry.columns
    if not columns.frames:
        return same
    if entry.has_shares:
        for index, frame in enumerate(rows.frame_slices()):
            same[:, frame] = entry.shares[:, frame, index]
        return same
    apart = (rows.frames, rows.grid.patches)
    q = entry.q[:, rows.video_slice].unflatten(1, apart).transpose(0, 1)
    k, v = (x[:, columns.video_slice].unflatten(1, apart).transpose(0, 1) for x in (entry.k, entry.v))
    inside = attend.partial(q, k, v, entry.scale).lse.transpose(0, 1).flatten(1)
    same[:, rows.video_slice] = torch.exp(inside - entry.lse[:, rows.video_slice])
    return same
