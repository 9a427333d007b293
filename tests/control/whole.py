"""Edits served to one call, and what they should give: float64, the whole matrix of an entry."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from control.edit import Edit
from probe import weigh
from probe.call import AttentionCall
from probe.plan import Handler
from probe.site import Branch, Site
from tests.probe.readout.calls import one_call, where


def double_call(**settings: Any) -> AttentionCall:
    """A call in double precision, so that only tables are rounded to single."""
    return one_call(dtype=torch.float64, **settings)


def batch(branches: Sequence[Branch], prompts: int = 1, **settings: Any) -> AttentionCall:
    """One entry for each branch, with different tensors."""
    calls = [double_call(seed=seed, **settings) for seed in range(len(branches))]
    tensors = {name: torch.cat([getattr(call, name) for call in calls]) for name in "qkv"}
    visible = None if calls[0].visible is None else calls[0].visible * len(calls)
    return replace(calls[0], **tensors, branches=tuple(branches), prompts=calls[0].prompts * prompts, visible=visible)


def served(call: AttentionCall, *edits: Handler, step: int = 0) -> AttentionCall:
    """The call after the edits of a run of 10 steps and their attention."""
    call.site = Site(step, 0, 0, 0, call.site.kind)
    for edit in sorted(edits, key=lambda edit: edit.rank):
        edit.begin(call.prompts, 10, 1)
        edit.serve(call, edit.where.rows(call.branches))
    if call.changes:
        weigh.run(call)
    return call


def output(call: AttentionCall, *edits: Edit, entry: int = 0, step: int = 0) -> Tensor:
    """[H, N, D] of an entry after the edits, without text rows that are hidden."""
    out = served(call, *edits, step=step).out
    if out is None:  # left to the model
        return attended(call, torch.zeros(1, 1), entry)
    return out[entry, :, : call.sides(entry)[0].total]


def logits(call: AttentionCall, entry: int = 0) -> Tensor:
    """float64 [H, N, M] of the rows and keys that are no hidden text."""
    rows, columns = (side.total for side in call.sides(entry))
    q, k = call.own["q"][entry, :, :rows].double(), call.own["k"][entry, :, :columns].double()
    return q @ k.mT * q.shape[-1] ** -0.5


def values(call: AttentionCall, entry: int = 0) -> Tensor:
    """float64 [H, M, D] of the keys that are no hidden text."""
    return call.own["v"][entry, :, : call.sides(entry)[1].total].double()


def attended(call: AttentionCall, bias: Tensor, entry: int = 0) -> Tensor:
    """[H, N, D] with a bias [N, M] or [H, N, M] on the logits."""
    return (logits(call, entry) + bias).softmax(-1) @ values(call, entry)


def inside(call: AttentionCall, side: Any, *kinds: tuple[str, int | None]) -> Tensor:
    """bool: the tokens of some kinds, each of one frame or (None) of all."""
    one = replace(call, prompts=call.prompts[:1])
    found: Iterable[int] = (i for kind, frame in kinds for i in where(one, side, kind, frame))
    mask = torch.zeros(call.sides(0)[side == "columns"].total, dtype=torch.bool)
    mask[list(found)] = True
    return mask


def position(call: AttentionCall, side: Any) -> list[tuple[int, int, int] | None]:
    """(frame, y, x) of each token, None for text; one token after the other."""
    grid, text = call.layout.grid, [None] * call.layout.text
    places = [(f, y, x) for f in range(grid.frames) for y in range(grid.height) for x in range(grid.width)]
    both = text + places if call.layout.order == "text-video" else places + text
    kind = call.site.kind
    every = places if kind == "self" or (kind == "cross" and side == "rows") else text if kind == "cross" else both
    return every[: call.sides(0)[side == "columns"].total]
