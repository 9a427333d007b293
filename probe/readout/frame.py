"""Frame mass: how the attention of each video frame is shared among the frames and the text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from probe import measure
from probe.entry import Entry
from probe.layout import TokenLayout
from probe.readout.base import Readout
from probe.site import JOINT

_DEFINITIONS = {
    "self_frame_mass": "mean over frames of the mass on the own frame, 0 to 1",
    "first_frame_mass": "mean over the later frames of the mass on the first frame, 0 to 1",
    "frame_causality": "(past - future) / (past + future) of the mass between frames, -1 to 1",
    "frame_decay": "rate of the fall of mass with distance in time, per token frame",
}
_TEXT = {"text_mass": "mean over frames of the mass on all text tokens, padding included, 0 to 1"}


@dataclass(eq=False)
class FrameMass(Readout):
    """Frame matrix T_fg: mean over the rows of frame f of the probability that falls on frame g, 0 to 1.

    Joint over all keys; the text, padding that may be seen included, is the last column if the keys have any. Rows sum
    to one. `video_conditional` renormalises each row of the attention over the video keys before the mean is taken, and
    leaves the text out. Uniform attention gives patches / keys. One frame (a picture) works.

    After a run `values[at]` is float32 [H, F, F + 1], or [H, F, F] without text. In single precision it is one more
    attention, with the frames as one-hot values; in half precision, where these would be rounded, one small attention
    per frame and the text, exp(lse_S - lse) for a key set S: the work of one more attention too. None with `fuse=True`,
    where the output is merged from the same parts (FlashInfer's recursive attention). Source of the matrix: Wen et al.
    2025 (arXiv 2504.10317). Error: 2e-6 in float32, 1e-4 in half precision.
    """

    video_conditional: bool = field(default=False, kw_only=True)

    kinds = JOINT | {"self"}
    in_parts = True
    rank = -1  # first, for its parts serve the region masses too
    stored = "frames"

    @property
    def definitions(self) -> dict[str, str]:
        """What each of the metrics is."""
        if not self.video_conditional:
            return _DEFINITIONS | _TEXT
        return {f"{name}_given_video": f"{said}, given the video" for name, said in _DEFINITIONS.items()}

    def reduce(self, entry: Entry) -> Tensor:
        """[H, F, F + 1], or [H, F, F]."""
        shares = entry.shares[:, entry.rows.video_slice]
        if self.video_conditional:
            shares = shares[..., : entry.columns.frames]
            shares = shares / shares.sum(-1, keepdim=True)
        return shares.unflatten(1, (entry.rows.frames, -1)).mean(2)

    def metrics(self, value: Any) -> dict[str, NDArray[np.float32]]:
        """Numbers per head [H]; see `definitions`. NaN where a single frame, or no text, leaves them undefined."""
        numbers = [
            measure.self_frame_mass(value),
            measure.first_frame_mass(value),
            measure.causality(value),
            measure.distance_decay(value)[0],
        ]
        if not self.video_conditional:
            has_text = value.shape[-1] > value.shape[-2]
            numbers.append(measure.text_mass(value) if has_text else np.full(len(value), np.nan))
        return dict(zip(self.definitions, np.asarray(numbers, np.float32), strict=True))

    def cost(self, layout: TokenLayout) -> float:
        """All rows against all keys, once more."""
        return 1.0
