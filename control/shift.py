"""Shift: attention outputs or hidden states move along a direction."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from control.address import Area, inside
from control.edit import Edit
from control.skip import refuse_heads
from probe.attend import exact_dtype
from probe.block import Later
from probe.call import AttentionCall
from probe.entry import index_of
from probe.errors import UsageError
from probe.plan import Stage
from probe.region import video


@dataclass(frozen=True)
class Steering:
    """The way from one area to another: the mean of X over `to` minus its mean over `away`, 0 where one has no row
    (In-Context Brush, arXiv 2505.20271, steers from the query to the demonstration).
    """

    to: Area
    away: Area

    def __str__(self) -> str:
        return f"{self.to} - {self.away}"


@dataclass(eq=False)
class Shift(Edit):
    """X <- X + strength * u in the selected rows, the video by default.

    X is "o", the output of the attention before its projection, [H, N, D], or "h", the hidden states of the video that
    the block gives, [N_video, C]. `direction` u is a Steering, or a tensor that broadcasts to X: [D] or, for the
    selected heads, [H, 1, D]; [C] for h. `keep_norm` gives each row, of each head, the norm it had. Shifts add up;
    those that keep norms, in their order.

    Raises:
        UsageError: another tensor, heads of h; (when served) a direction that does not fit, rows of text in h.
    """

    tensor: Literal["o", "h"]
    direction: Tensor | Steering
    keep_norm: bool = False
    rows: Area | None = field(default_factory=video, kw_only=True)
    stage: Stage = field(default=Stage.MERGE, kw_only=True)
    rank = 4
    composes = True

    def __post_init__(self) -> None:
        self.touches = touched(self, self.tensor)

    def __str__(self) -> str:
        along = self.direction if isinstance(self.direction, Steering) else tuple(self.direction.shape)
        return f"Shift({self.tensor} along {along})"

    def apply(self, call: AttentionCall, entry: int, amount: float) -> None:
        """Move the rows of one batch entry, now or when the block returns."""
        areas = (self.direction.to, self.direction.away) if isinstance(self.direction, Steering) else ()
        if self.tensor == "h":
            rows, *ends = (video_rows(area, call, entry) for area in (self.rows, *areas))
            moved = partial(self._moved, rows=rows, ends=ends, amount=amount)
            call.later.append(Later("block", entry, lambda _, made: made.on_video(moved), by=self))
            return
        rows, *ends = (inside(area, call, entry) for area in (self.rows, *areas))
        out, heads = call.writable("out"), index_of(self.heads(call), call.q.device)
        out[entry, heads] = self._moved(out[entry, heads], rows, ends, amount)

    def _moved(self, x: Tensor, rows: Tensor, ends: list[Tensor], amount: float) -> Tensor:
        """x [..., N, C]; `ends` are the rows of a Steering's areas."""
        old = x.to(exact_dtype(x.dtype))
        new = old + amount * (_mean(old, ends[0], ends[1]) if ends else self._fitting(old))
        if self.keep_norm:
            new = new * (old.norm(dim=-1, keepdim=True) / new.norm(dim=-1, keepdim=True).clamp_min(1e-12))
        return torch.where(rows.unsqueeze(-1), new.to(x.dtype), x)

    def _fitting(self, x: Tensor) -> Tensor:
        assert isinstance(self.direction, Tensor)
        sizes = zip(reversed(self.direction.shape), reversed(x.shape), strict=False)
        if self.direction.dim() > x.dim() or not all(mine in (1, size) for mine, size in sizes):
            raise UsageError(
                f"A direction must broadcast to {tuple(x.shape)}. Got {tuple(self.direction.shape)}. Give one number "
                "per channel."
            )
        return self.direction.to(x)


def touched(edit: Edit, tensor: str) -> frozenset[str]:
    """The tensor of a plan that an edit of o or h changes.

    Raises:
        UsageError: another name, or some heads of h.
    """
    if tensor not in ("o", "h"):
        raise UsageError(f"A {type(edit).__name__} must name o or h. Got {tensor!r}.")
    if tensor == "h":
        refuse_heads(edit, edit.where)
    return frozenset({"out" if tensor == "o" else "h"})


def video_rows(area: Area | None, call: AttentionCall, entry: int) -> Tensor:
    """bool [N_video]: the video tokens in an area, all for None.

    Raises:
        UsageError: the area has text, which has no place among them.
    """
    within = inside(area, call, entry)
    chosen = within[call.rows.video_slice]
    if area is not None and int(within.sum()) > int(chosen.sum()):
        raise UsageError(f"These rows must be of the video. Got {area}, with text, at {call.site}. Use video().")
    return chosen


def _mean(x: Tensor, to: Tensor, away: Tensor) -> Tensor:
    """Difference of two means over rows, [..., 1, C]."""
    counts = torch.stack([to.sum(), away.sum()])
    there, here = ((x * area.unsqueeze(-1)).sum(-2, keepdim=True) for area in (to, away))
    way = there / counts[0].clamp_min(1) - here / counts[1].clamp_min(1)
    return torch.where(counts.min() > 0, way, torch.zeros_like(way))
