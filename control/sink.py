"""Sinks: the columns that take an outsized share of the attention, found in each call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from control.address import Found, Side, inside
from control.shadow import shadow
from probe.call import AttentionCall
from probe.errors import UsageError
from probe.region import video
from probe.site import Span, chosen


@dataclass(frozen=True)
class Sinks(Found):
    """The tokens j with N mean_i p_ij > `threshold`: more than that many times their uniform share of the N keys.

    The mean is over the video rows i of the call, as in `probe.Sinks`, and over `heads` (all if None): one set for an
    entry. For a set of its own for each head, use one edit per head, `Sinks(heads=h)` at `Where(heads=h)`. `tokens`
    says which tokens may count. p is the attention of the call's q and k as they are when it is asked: Rotate, Transfer
    and Scale of q and k come first, changes of weights do not count. One swapped attention call each time, and the
    program waits for the device.

    Sinks are columns. Used as rows they are the same tokens, which cross attention does not have: none there. Source:
    enrichment as in `probe.Sinks`. VAR finds sinks by massive activations instead; this rule needs no dimensions of a
    model.

    Raises:
        UsageError: a threshold below 1, or other tokens.
    """

    threshold: float = 10.0
    tokens: Literal["video", "text", "all"] = "video"
    heads: Span = None

    def __post_init__(self) -> None:
        if not self.threshold >= 1 or self.tokens not in ("video", "text", "all"):
            raise UsageError(
                "Sinks must have a threshold of 1 or more, and be video, text or all. Got "
                f"{self.threshold} and {self.tokens!r}. 10 is ten times the uniform share."
            )

    def inside(self, call: AttentionCall, entry: int, side: Side) -> Tensor:
        """bool, one per row or column of the call; padding that is hidden is outside."""
        found = torch.zeros(getattr(call, side).total, dtype=torch.bool, device=call.q.device)
        if side == "rows" and call.rows != call.columns:
            return found
        plain = shadow(call) if call.changes else call
        seen = plain.entry(entry, chosen(self.heads, call.q.shape[1]))
        share = seen.video_columns.mean(0) * seen.keys
        found[: len(share)] = share > self.threshold
        if self.tokens == "all":
            return found
        on_video = inside(video(), call, entry, side)
        return found & (on_video if self.tokens == "video" else ~on_video)

    def __str__(self) -> str:
        heads = "" if self.heads is None else f" in heads {self.heads}"
        return f"sinks({self.tokens}, over {self.threshold:g} times uniform{heads})"
