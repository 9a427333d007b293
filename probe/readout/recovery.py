"""Recovery: which sparse pattern, own frame or own position, gives back the output of a head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from probe.entry import Entry, on_device
from probe.errors import UsageError
from probe.layout import TokenLayout
from probe.readout.base import Readout
from probe.readout.sample import OfHead, map_rows, video_rows
from probe.site import JOINT

PATTERNS = ("spatial", "temporal")
_WORK = 8.0  # measured on a CPU
_LEAST = 1e-12  # relative squared errors below this are rounding
_TINY = torch.finfo(torch.float32).tiny  # rows that give the pattern nothing at all recover nothing


@dataclass(eq=False, kw_only=True)
class Recovery(Readout):
    """`||O - O'||^2 / ||O||^2` over sampled video rows of a head, O' from the keys of a sparse pattern, renormalised.

    Patterns: `spatial` keeps the own frame, `temporal` the own position, plus and minus `radius` patches, in every
    frame; both keep the text. `rows` rows of every frame are drawn, the same at every call with one `seed`. The head is
    spatial when the spatial error is the smaller one, by the margin log(temporal / spatial); when both are large,
    neither pattern recovers it.

    After a run `values[at]` is float32 [H, 2] over PATTERNS, 0 = recovered. Error 1e-5 in float32, 1e-3 in half
    precision, besides that of the draw. Source: Sparse VideoGen (Xi et al. 2025, arXiv 2502.01776), which decides by
    the same two errors on 32 to 64 rows, with bands of whole blocks of tokens.

    Raises:
        UsageError: a negative radius, or no rows.
    """

    radius: int = 1
    rows: int = 16
    seed: int = 0

    kinds = JOINT | {"self"}

    def __post_init__(self) -> None:
        if self.radius < 0 or self.rows < 1:
            raise UsageError(
                f"Recovery must have radius >= 0 and rows >= 1. Got {self.radius} and {self.rows}. Leave them out for "
                "1 patch and 16 rows a frame."
            )
        super().__post_init__()

    @property
    def definitions(self) -> dict[str, str]:
        """What each of the metrics is."""
        near = f"the own position +-{self.radius} in every frame"
        return {
            "spatial_error": "|O - O'|^2 / |O|^2 over video rows with the own frame and the text alone, 0 = recovered",
            "temporal_error": f"|O - O'|^2 / |O|^2 over video rows with {near} and the text alone, 0 = recovered",
            "recovery_margin": "log(temporal_error / spatial_error), positive = spatial, negative = temporal",
        }

    def reduce(self, entry: Entry) -> Tensor:
        """[H, 2]."""
        drawn = video_rows(entry.rows, self.rows, self.seed).ravel().tolist()
        rows = on_device(tuple(drawn), torch.long, entry.q.device)

        def of(part: Tensor) -> OfHead:
            masks = self._masks(entry.columns, part - entry.rows.video_slice.start)
            return lambda head, p: _squares(p, entry.v[head].to(p.dtype), masks)

        total, *errors = map_rows(entry, rows, of).sum(1).unbind(-1)
        return torch.stack([error / total for error in errors], 1)

    def cost(self, layout: TokenLayout) -> float:
        """The sampled rows, of which each is worth about eight of a fused attention: three outputs, and masks."""
        return _WORK * min(self.rows, layout.grid.patches) * layout.grid.frames / layout.total

    def metrics(self, value: Any) -> dict[str, NDArray[np.float32]]:
        """See `definitions`."""
        spatial, temporal = value[:, 0], value[:, 1]
        margin = np.log((temporal + _LEAST) / (spatial + _LEAST))
        return {"spatial_error": spatial, "temporal_error": temporal, "recovery_margin": margin}

    def _masks(self, columns: TokenLayout, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The keys that video rows (counted from the first one) keep, by PATTERNS, bool [r, M]."""
        axes = (torch.arange(size, dtype=torch.int16, device=rows.device) for size in columns.grid.shape)
        frame, down, right = torch.cartesian_prod(*axes).mT
        spatial = torch.ones(len(rows), columns.total, dtype=torch.bool, device=rows.device)
        temporal = spatial.clone()
        spatial[:, columns.video_slice] = frame[rows, None] == frame
        temporal[:, columns.video_slice] = (down[rows, None] - down).abs() <= self.radius
        temporal[:, columns.video_slice] &= (right[rows, None] - right).abs() <= self.radius
        return spatial, temporal


def _squares(p: Tensor, v: Tensor, masks: tuple[Tensor, Tensor]) -> Tensor:
    """||O||^2 of rows p [r, M], and ||O - O'||^2 with each of the masks, [r, 3]."""
    out = p @ v
    kept = (p * mask for mask in masks)
    lost = (out - (part @ v) / part.sum(-1, keepdim=True).clamp_min(_TINY) for part in kept)
    return torch.stack([out, *lost], 1).square().sum(-1)
