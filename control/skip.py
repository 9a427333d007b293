"""Skip: a block, its attention or its feed-forward adds nothing."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from control.edit import Edit
from probe.block import Later, Point, Streams
from probe.call import AttentionCall
from probe.errors import UsageError
from probe.plan import Stage
from probe.site import Where

POINTS = ("block", "attention", "feed_forward")


@dataclass(eq=False)
class Skip(Edit):
    """`what` contributes nothing to the selected branches and rows (all rows, padding included, by default).

    "block": what goes into the block comes out of it, bit for bit (the bypass of SLG and STG-R; Stable Flow, arXiv
    2411.14430, finds vital layers with it). "attention" and "feed_forward": in their place 0 is added to the stream,
    without the bias of their output projections; where a layer has two attentions (SD3.5, Wan), that of the selected
    call. Single-stream blocks mix both in one projection, whose bias stays: what goes into it from one of them is 0. A
    strength below 1 takes that share away.

    Raises:
        UsageError: another `what`, or some heads: a block is skipped whole.
    """

    what: Point = "block"
    stage: Stage = field(default=Stage.MERGE, kw_only=True)
    rank = 6
    composes = True

    def __post_init__(self) -> None:
        if self.what not in POINTS:
            raise UsageError(f"A Skip must name one of {', '.join(POINTS)}. Got {self.what!r}.")
        refuse_heads(self, self.where)
        self.touches = frozenset({self.what})

    def __str__(self) -> str:
        return f"Skip({self.what})"

    def apply(self, call: AttentionCall, entry: int, amount: float) -> None:
        """Ask for one batch entry."""
        rows = Streams.parted(self.extent(call, entry), call.rows)

        def towards(made: Tensor, instead: Tensor) -> Tensor:
            return torch.lerp(made, instead.to(made.dtype), amount)

        def without(inputs: Streams, outputs: Streams) -> Streams:
            instead = inputs if self.what == "block" else outputs.each(torch.zeros_like)
            return outputs.where(rows, outputs.each(towards, instead))

        call.later.append(Later(self.what, entry, without, by=self))


def refuse_heads(edit: Edit, where: Where) -> None:
    """What is changed outside of attention has no heads.

    Raises:
        UsageError: some are selected.
    """
    if where.heads is not None:
        raise UsageError(f"{edit} must leave heads out: outside of attention there are none. Got {where.heads}.")
