"""Attention whose weights were changed: the only place that computes it, by the cheapest exact way.

Shapes: q [B, H, N, D]; k, v [B, H, M, D]; lse [B, H, N].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields

import torch
import torch.nn.functional as F
from torch import Tensor

from probe import attend
from probe.attend import State
from probe.call import AttentionCall
from probe.change import Added, Bias, Change, Factors, Map, Move
from probe.entry import index_of
from probe.errors import PlanError
from probe.weigh_choice import way_of
from probe.weigh_rows import Part
from probe.weigh_table import LARGEST, Table, table_of

__all__ = ["Added", "Bias", "Change", "Factors", "Map", "Move", "attention", "run"]

_SAME_BITS: dict[tuple[object, ...], bool] = {}


def run(call: AttentionCall, edits: Sequence[object] = ()) -> str:
    """Compute `call.out` with all its changes; says how. Entries and heads without changes keep the bits of the plain
    kernel: the model's own attention if it is torch's, else they are left to the model. Changes that do nothing are
    dropped from the call; where none is left all of it is left to the model.

    Raises:
        PlanError: the changes of `edits` together hide every key of a row, or multiply a weight by more than e^80.
    """
    with torch.no_grad(), torch.autocast(call.q.device.type, enabled=False):
        call.changes = [change for change in call.changes if _matters(call, change)]
        if not call.changes:
            return "plain"
        said = [_compute(call, edits, *part) for part in _parts(call)]
        if call.native:
            call.out = call.over()
    return ", ".join(way for way in dict.fromkeys(said) if way != "plain") or "plain"


def attention(call: AttentionCall, entry: int) -> State:
    """One entry with its changes: out [H, N, D] and the lse [H, N] of its normaliser."""
    made = State(
        torch.empty_like(call.q[entry]), call.q.new_empty(call.q.shape[1:3], dtype=attend.exact_dtype(call.q.dtype))
    )
    with torch.no_grad():
        for heads, changes in _alike(call, entry):
            part, some = _part(call, (entry,), heads, changes), index_of(heads, call.q.device)
            _, way = way_of(part)
            made.out[some], made.lse[some] = (x[0] for x in way(part))
    return made


def _compute(
    call: AttentionCall,
    edits: Sequence[object],
    entries: tuple[int, ...],
    heads: tuple[int, ...],
    changes: list[Change],
) -> str:
    """Some entries and heads with equal changes; says how."""
    part = _part(call, entries, heads, changes)
    table = table_of(part.some(Factors), part.q.shape[2], part.keys)
    _refuse_large(call, table, edits)
    said, way = way_of(part)
    if said != "plain":
        state = way(part)
        if len(edits) > 1 and (table.blind.any() or part.some(Bias)):  # one alone sees to itself
            _refuse_blind(call, entries[0], state, edits)
        call.computed(entries, heads, state)
    elif call.native:
        call.computed(entries, heads, _own(call, entries, heads))
    return said


def _refuse_large(call: AttentionCall, table: Table, edits: Sequence[object]) -> None:
    if table.largest > LARGEST:
        raise PlanError(
            f"A weight must be multiplied by 5e34 (e^80) at most. Got more at {call.site} by all of "
            f"{', '.join(map(str, edits))}. Lower the biases, or hide the other columns instead."
        )


def _refuse_blind(call: AttentionCall, entry: int, state: State, edits: Sequence[object]) -> None:
    rows = call.sides(entry)[0].total
    if state.lse[:, :, :rows].isneginf().any():
        raise PlanError(
            f"Every row must see at least one key. Got {', '.join(map(str, edits))} at {call.site}, which together "
            "hide all keys of some rows. Leave one of them out, or choose other rows or columns."
        )


def _parts(call: AttentionCall) -> list[tuple[tuple[int, ...], tuple[int, ...], list[Change]]]:
    """Entries, heads and changes, those of the first entry; entries with equal changes are together."""
    found: dict[object, tuple[list[int], tuple[int, ...], list[Change]]] = {}
    for entry in range(len(call.q)):
        for heads, changes in _alike(call, entry):
            seen = None if call.visible is None else call.visible[entry]
            key = heads, seen, tuple(_sign(change) for change in changes)
            found.setdefault(key, ([], heads, changes))[0].append(entry)
    return [(tuple(entries), heads, changes) for entries, heads, changes in found.values()]


def _alike(call: AttentionCall, entry: int) -> list[tuple[tuple[int, ...], list[Change]]]:
    """The heads of an entry that share all their changes, and these."""
    groups: dict[tuple[int, ...], list[int]] = {}
    mine = [change for change in call.changes if change.entry == entry]
    for head in range(call.q.shape[1]):
        which = tuple(i for i, change in enumerate(mine) if change.heads is None or head in change.heads)
        groups.setdefault(which, []).append(head)
    return [(tuple(heads), [mine[i] for i in which]) for which, heads in groups.items()]


def _sign(change: Change) -> tuple[object, ...]:
    """Equal for changes that differ in their entry only: made of the same tensors and functions."""
    values = (getattr(change, field.name) for field in fields(change) if field.name != "entry")
    return type(change), *(id(value) if isinstance(value, Tensor) or callable(value) else value for value in values)


def _matters(call: AttentionCall, change: Change) -> bool:
    """Whether a change does anything at all."""
    if isinstance(change, Factors):
        keys = call.k.shape[2] if call.visible is None else call.visible[change.entry]
        return not table_of([change], call.q.shape[2], keys).plain
    if isinstance(change, Added):
        return change.bias > -math.inf and change.k.numel() > 0
    return not (isinstance(change, Move) and change.keep == 1)


def _part(call: AttentionCall, entries: tuple[int, ...], heads: tuple[int, ...], changes: list[Change]) -> Part:
    """Some entries and heads, with the keys they may see."""
    seen = None if call.visible is None else call.visible[entries[0]]
    q, k, v = (_some(x, entries, heads) for x in (call.q, call.k, call.v))
    return Part(q, k[:, :, :seen], v[:, :, :seen], attend.scale_of(q, call.scale), heads, changes)


def _own(call: AttentionCall, entries: tuple[int, ...], heads: tuple[int, ...]) -> State:
    """The model's own attention of some entries and heads, bit for bit; compared once with that of the whole call."""
    q, k, v = (_some(x, entries, heads) for x in (call.q, call.k, call.v))
    mask = call.mask if call.mask is None or len(call.mask) == 1 else call.mask[list(entries)]
    state = attend.plain(q, k, v, call.scale, mask)
    if state is None:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=call.scale)
        state = State(out, attend.partial(q, k, v, call.scale, attend.as_bias(mask, q.dtype)).lse)
    kind = (q.device.type, q.dtype, call.q.shape, call.k.shape, call.q.stride(), entries, heads, mask is None)
    if _SAME_BITS.get(kind, False):
        return state
    whole = F.scaled_dot_product_attention(call.q, call.k, call.v, attn_mask=call.mask, scale=call.scale)
    _SAME_BITS[kind] = torch.equal(_some(whole, entries, heads), state.out)
    return state._replace(out=_some(whole, entries, heads))


def _some(tensor: Tensor, entries: tuple[int, ...], heads: tuple[int, ...]) -> Tensor:
    """Some entries and heads of [B, H, ...], without a copy where they follow each other."""
    return tensor[index_of(entries, tensor.device)][:, index_of(heads, tensor.device)]
