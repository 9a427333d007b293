"""Bands chosen online: each head takes the one of two that gives its output back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from control.edit import Edit
from control.shadow import shadow
from control.window import Band, Sight
from probe.call import AttentionCall
from probe.entry import Entry
from probe.errors import UsageError
from probe.layout import TokenLayout
from probe.readout.sample import OfHead, map_rows, video_rows
from probe.site import JOINT
from probe.word import Prompt

ORDERS: tuple[Literal["spatial", "temporal"], ...] = ("spatial", "temporal")
"""The two bands of Sparse VideoGen."""

_TINY = torch.finfo(torch.float32).tiny  # rows that give a band nothing at all


@dataclass(eq=False)
class BestBand(Edit):
    """Each head sees a spatial or a temporal `Band`, by the squared error of its output on sampled video rows in the
    same call: Sparse VideoGen's online profiling (arXiv 2502.01776), which samples 32 to 64 rows.

    `sampled` rows of every frame are drawn, the same at every call with one `seed`; ties are spatial. `worst` takes the
    other band, as a control. The output is that of the q, k and v of the call as they are when it is asked: changes of
    weights do not count. Text is always seen. Its dense first steps and layers are a matter of `where`. The program
    waits for the device once per entry. `choices` has what was chosen, by step, layer and batch entry: bool [heads],
    true is spatial.

    Raises:
        UsageError: fewer than one row, or a width that makes no band.
    """

    width: float = 1.5
    sampled: int = field(default=8, kw_only=True)
    seed: int = field(default=0, kw_only=True)
    worst: bool = field(default=False, kw_only=True)
    touches = frozenset({"weights"})
    rank = 5
    composes = True
    kinds = JOINT | {"self"}

    def __post_init__(self) -> None:
        if self.sampled < 1:
            raise UsageError(f"A choice of bands must have sampled rows of 1 or more. Got {self.sampled}.")
        self.bands = tuple(Band(self.width, order, rows=self.rows, where=self.where) for order in ORDERS)
        self.choices: dict[tuple[int, int, int], list[bool]] = {}

    def __str__(self) -> str:
        return f"BestBand({self.width:g} frames{', worst' if self.worst else ''})"

    def begin(self, prompts: Sequence[Prompt], steps: int, layers: int) -> None:
        """Forget the last run."""
        super().begin(prompts, steps, layers)
        self.choices = {}

    def end(self) -> None:
        """Let go of the bands' masks."""
        for band in self.bands:
            band.end()

    def cost(self, layout: TokenLayout) -> float:
        """The sampled rows, each worth about eight of a fused attention, and the mask of the bands."""
        return 8 * min(self.sampled, layout.grid.patches) * layout.frames / layout.total + self.bands[0].cost(layout)

    def apply(self, call: AttentionCall, entry: int, amount: float) -> None:
        """Choose, and ask for one band at some heads and the other one elsewhere."""
        heads = self.heads(call)
        spatial, temporal = self._errors(call, entry, heads).unbind(-1)
        chosen = ((spatial > temporal) if self.worst else (spatial <= temporal)).tolist()
        self.choices[call.site.step, call.site.layer, entry] = chosen
        for band, takes in zip(self.bands, (True, False), strict=True):
            mine = tuple(head for head, own in zip(heads, chosen, strict=True) if own == takes)
            tried = shadow(call)
            if mine:
                band.apply(tried, entry, amount)
            for change in tried.changes[len(call.changes) :]:
                call.change(replace(change, heads=mine))

    def _errors(self, call: AttentionCall, entry: int, heads: tuple[int, ...]) -> Tensor:
        """Squared error of the sampled rows with each of the bands, [h, 2]."""
        seen = call.entry(entry, heads)
        rows = torch.as_tensor(video_rows(seen.rows, self.sampled, self.seed).ravel(), device=call.q.device)
        bands = [next(iter(band.sights(call))) for band in self.bands]

        def of(part: Tensor) -> OfHead:
            masks = [_mask(seen, part, group, sees) for group, sees in bands]
            return lambda head, p: _lost(p, seen.v[head].to(p.dtype), masks)

        return map_rows(seen, rows, of).sum(1)


def _mask(seen: Entry, rows: Tensor, group: Tensor, sees: Sight) -> Tensor:
    """bool [r, M]: what some video rows see with a band; text always."""
    mask = torch.ones(len(rows), seen.columns.total, dtype=torch.bool, device=rows.device)
    mine = group[rows - seen.rows.video_slice.start]
    mask[:, seen.columns.video_slice] = sees(mine[:, None], group[None])
    return mask


def _lost(p: Tensor, v: Tensor, masks: Sequence[Tensor]) -> Tensor:
    """||O - O'||^2 of rows p [r, M] with each of the masks, [r, 2]."""
    out = p @ v
    kept = (p * mask for mask in masks)
    lost = (out - (part @ v) / part.sum(-1, keepdim=True).clamp_min(_TINY) for part in kept)
    return torch.stack([one.square().sum(-1) for one in lost], -1)
