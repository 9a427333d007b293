"""The one place that knows the order inside an attention call:

1. readouts of the model's own tensors, 2. edits, 3. the attention, 4. readouts of the attention used, 5. merges.
"""

from __future__ import annotations

import torch
from torch import Tensor

from probe import weigh
from probe.call import AttentionCall
from probe.errors import PlanError
from probe.plan import Handler, Plan, Stage


def before_attention(call: AttentionCall, plan: Plan) -> None:
    """Stages 1 and 2. Sets `call.out` if the attention is already computed: the model's own kernel is then skipped."""
    handlers = plan.at(call.site)
    before, edits = ([h for h in handlers if h.stage == stage] for stage in (Stage.BEFORE, Stage.EDIT))
    if any(h.needs_lse and call.rows_of(h.where) for h in before) and not any(call.rows_of(h.where) for h in edits):
        call.run_with_lse()  # what is seen before edits is what is used
    _serve(call, plan, before)
    _refuse_overlap(call, edits)
    _serve(call, plan, edits)
    if call.changes:
        weighed = [h for h in edits if not h.touches.isdisjoint(("weights", "added")) and call.rows_of(h.where)]
        plan.how[call.site, weigh.run(call, weighed)] += 1
    readouts = [h for h in handlers if h.stage == Stage.USED and call.rows_of(h.where)]
    if plan.fuse and call.out is None and not call.changes and any(h.in_parts for h in readouts):
        call.run_in_parts()
    if call.out is None and any(h.needs_lse for h in readouts):
        call.run_with_lse()


def after_attention(call: AttentionCall, plan: Plan, out: Tensor) -> Tensor:
    """Stages 4 and 5; returns what the model goes on with, `out` itself if nothing merged."""
    call.out = call.own["out"] = call.over(out) if call.out is None else out
    handlers = plan.at(call.site)
    _serve(call, plan, [h for h in handlers if h.stage == Stage.USED])
    merges = [h for h in handlers if h.stage == Stage.MERGE]
    _refuse_overlap(call, merges)
    _serve(call, plan, merges)
    return call.out


def _serve(call: AttentionCall, plan: Plan, handlers: list[Handler]) -> None:
    """Outside of autocast: a readout keeps its precision whatever the model runs in."""
    if not handlers:
        return
    with torch.autocast(call.q.device.type, enabled=False):
        for handler in handlers:
            rows = call.rows_of(handler.where)
            if rows:
                handler.serve(call, rows)
                if handler.met(call, rows):
                    plan.served(handler)


def _refuse_overlap(call: AttentionCall, edits: list[Handler]) -> None:
    for i, one in enumerate(edits):
        for other in edits[i + 1 :]:
            same = one.rank == other.rank and one.touches & other.touches and not (one.composes and other.composes)
            heads = set(one.where.head_list(call.q.shape[1])) & set(other.where.head_list(call.q.shape[1]))
            both = set(call.rows_of(one.where)) & set(call.rows_of(other.where))
            if same and heads and any(_meet(one, other, call, row) for row in both):
                raise PlanError(
                    f"Two edits must not change the same tensor at the same place. Got {one} and {other} at "
                    f"{call.site}. Separate their branches, rows or heads."
                )


def _meet(one: Handler, other: Handler, call: AttentionCall, row: int) -> bool:
    """Whether two edits change the same rows of a batch entry."""
    a, b = one.extent(call, row), other.extent(call, row)
    return a is None or b is None or a.shape != b.shape or bool((a & b).any())
