"""Which tokens of an attention call an edit changes, and how much: areas and gates, resolved per batch entry."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from probe.call import AttentionCall
from probe.errors import UsageError
from probe.layout import TokenLayout
from probe.region import Region
from probe.word import Prompt

Side = Literal["rows", "columns"]


class Found(ABC):
    """An area that is found while the model runs: a mask made of its own attention, the sinks of a call."""

    @abstractmethod
    def inside(self, call: AttentionCall, entry: int, side: Side) -> Tensor:
        """bool, one per row or column of the call; soft in [0, 1] where it is used as a gate."""

    def __invert__(self) -> Found:
        return Rest(self)


class Rest(Found):
    """The video tokens outside of an area."""

    def __init__(self, area: Found) -> None:
        self.area = area

    def inside(self, call: AttentionCall, entry: int, side: Side) -> Tensor:
        """bool, one per row or column."""
        within, video = self.area.inside(call, entry, side), getattr(call, side).video_slice
        rest = torch.zeros_like(within)
        rest[video] = ~within[video] if within.dtype == torch.bool else 1 - within[video]
        return rest

    def __str__(self) -> str:
        return f"~{self.area}"


class BothHalves(Found):
    """The tokens of a region where the conditional half shows its words, in the unconditional half as well."""

    def __init__(self, area: Region) -> None:
        self.area = area

    def inside(self, call: AttentionCall, entry: int, side: Side) -> Tensor:
        """bool, one per row or column."""
        return _looked_up(self.area, call, entry, side, _prompt(call, entry))

    def __str__(self) -> str:
        return f"{self.area} in both halves"


Area = Region | Found
Gate = Area | Tensor
"""Where a soft edit applies: an area, or a weight in [0, 1] for each row [N] or each video token [frames, h, w]."""


def inside(area: Area | None, call: AttentionCall, entry: int, side: Side = "rows") -> Tensor:
    """bool [N] or [M]: the tokens of an entry in an area, all for None. Words are looked up in the prompt the entry
    shows; the unconditional half shows none, so that words select nothing there.

    Raises:
        WordError: the prompt does not have the word.
        UsageError: a soft area where one with edges is needed.
    """
    if area is None:
        return torch.ones(getattr(call, side).total, dtype=torch.bool, device=call.q.device)
    if isinstance(area, Region):
        shown = _prompt(call, entry) if call.branches[entry].guided else Prompt.blank(call.layout.text)
        return _looked_up(area, call, entry, side, shown)
    found = area.inside(call, entry, side)
    if found.dtype != torch.bool:
        raise UsageError(f"An area must be inside or outside. Got soft weights from {area}. Give it a threshold.")
    return found


def gate_of(gate: Gate | None, call: AttentionCall, entry: int, side: Side = "rows") -> Tensor:
    """Weights [N] in [0, 1] for the rows of an entry, in the dtype of its tensors; 1 for None, 0 on text for a mask of
    the video. For the columns [M] likewise; where these are other tokens than the rows (cross attention), weights of
    the video are 0 there.

    Raises:
        UsageError: a tensor of another size than the rows or the grid.
    """
    rows, dtype = call.rows, call.q.dtype
    if isinstance(gate, Tensor) and side == "columns" and rows != call.columns:
        return torch.zeros(call.columns.total, dtype=dtype, device=call.q.device)
    if isinstance(gate, Tensor):
        flat = gate.reshape(-1).to(call.q.device, dtype)
        if len(flat) == rows.total:
            return flat
        if tuple(gate.shape) != rows.grid.shape:
            raise UsageError(
                f"A gate must have one weight per row, {rows.total}, or the shape of the grid, {rows.grid.shape}. Got "
                f"{tuple(gate.shape)}. Resize the mask."
            )
        return _on_video(flat, rows)
    if gate is None or isinstance(gate, Region):
        return inside(gate, call, entry, side).to(dtype)
    return gate.inside(call, entry, side).to(dtype)


def _on_video(flat: Tensor, rows: TokenLayout) -> Tensor:
    full = flat.new_zeros(rows.total)
    full[rows.video_slice] = flat
    return full


def _prompt(call: AttentionCall, entry: int) -> Prompt | None:
    """The prompt of an entry, None where the run was not told it."""
    nearest = call.branches[entry].nearest
    return call.prompts[nearest] if nearest < len(call.prompts) else None


def _looked_up(area: Region, call: AttentionCall, entry: int, side: Side, prompt: Prompt | None) -> Tensor:
    seen, total = call.sides(entry)[side == "columns"], getattr(call, side).total
    return _mask(area, seen, prompt, total, call.q.device)


@lru_cache(maxsize=512)
def _mask(area: Region, side: TokenLayout, prompt: Prompt | None, total: int, device: torch.device) -> Tensor:
    """On the device, padded to the length of the call where text is hidden at the end."""
    if prompt is not None and side.text:
        prompt = prompt.first(side.text)
    with torch.inference_mode(False):
        mask = torch.zeros(total, dtype=torch.bool, device=device)
        mask[: side.total] = torch.as_tensor(area.mask(side, prompt), device=device)
        return mask
