"""Exact ways to compute attention with factors: fused attentions over parts of the rows and columns, merged.

Each way takes a part and the table of its factors, and gives the output [B, h, N, D] and the log-normaliser [B, h, N];
a row that sees nothing gets 0 and -inf.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from probe import attend
from probe.attend import State
from probe.entry import Place
from probe.weigh_rows import Part
from probe.weigh_table import Table

THIN = 16
"""Columns up to which a correction of the plain attention beats a part of their own."""

_PART_BYTES = 2**28
"""Most memory that the outputs of parts take at once."""


def plain(part: Part) -> State:
    """All rows on all columns, without factors."""
    return attend.partial(part.q, part.k, part.v, part.scale)


def empty(part: Part) -> State:
    """Where the output and the log-normaliser of a part go."""
    return State(torch.empty_like(part.q), part.q.new_empty(part.q.shape[:-1], dtype=attend.exact_dtype(part.q.dtype)))


class Base(NamedTuple):
    """Groups of rows whose attention is the plain one but for few columns, bool [R], and the groups of these columns,
    bool [C].
    """

    rows: Tensor
    columns: Tensor


def base_groups(table: Table) -> Base:
    """The rows that a thin correction of the plain attention serves. Of raised columns only: where a lowered one had
    most of the mass, the rest would be a difference of near numbers.
    """
    raised = (~table.changed | ((table.denominator >= 1) & (table.numerator.abs() >= 1))).all(1)
    columns = table.changed[raised].any(0)
    if table.column_sizes[columns].sum() > THIN:
        return Base(~table.changed.any(1), torch.zeros_like(columns))
    return Base(raised, columns)


def by_rows(part: Part, table: Table) -> State:
    """Each group of rows on the columns it sees: one attention for each of its factors; the groups that are plain but
    for few columns together.
    """
    made, base = empty(part), base_groups(table)
    if base.rows.any():
        rows = table.row_places(base.rows, part.q.device)
        made.out[:, :, rows], made.lse[:, :, rows] = _thin(part.at(rows), table, rows, base.columns)
    for group in (~base.rows).nonzero().squeeze(1).tolist():
        rows = table.row_places(torch.arange(len(base.rows)) == group, part.q.device)
        made.out[:, :, rows], made.lse[:, :, rows] = _group(part.at(rows), table, group)
    return made


def by_columns(part: Part, table: Table) -> State:
    """Each group of columns for the rows that see it, merged; some heads at a time, so that memory stays bounded."""
    step = max(1, _PART_BYTES // (part.q.element_size() * table.numerator.shape[1] * part.q[:, 0].numel()))
    made = []
    for at in range(0, part.q.shape[1], step):
        some = slice(at, at + step)
        made.append(_columns(replace(part, q=part.q[:, some], k=part.k[:, some], v=part.v[:, some]), table))
    return made[0] if len(made) == 1 else State(*(torch.cat(side, 1) for side in zip(*made, strict=True)))


def combine(states: Sequence[State], numerators: Tensor, denominators: Tensor) -> State:
    """sum_S n_S e^lse_S out_S / sum_S d_S e^lse_S over disjoint key sets, and the log of the denominator; the factors
    [S, N], or [S, 1] for all rows.
    """
    lses = torch.stack([state.lse for state in states])
    top = lses.amax(0)
    top = top.masked_fill(top.isneginf(), 0.0)
    odds = (lses - top).exp_()
    total = torch.einsum("sbhn,sn->bhn", odds, denominators.to(odds).expand(-1, odds.shape[-1]))
    weights = torch.where(total > 0, odds * numerators.to(odds)[:, None, None] / total, 0.0)
    out = states[0].out * weights[0].unsqueeze(-1)
    for weight, state in zip(weights[1:], states[1:], strict=True):
        out.addcmul_(state.out.to(out.dtype), weight.unsqueeze(-1))
    return State(out.to(states[0].out.dtype), total.log() + top)


def _thin(part: Part, table: Table, rows: Place, columns: Tensor) -> State:
    """The plain attention of these rows, and what a few columns add to it."""
    state = plain(part)
    if not columns.any():
        return state
    few = part.on(table.column_places(columns, part.q.device))
    p = attend.probabilities(part.q, few.k, state.lse, part.scale)
    labels = table.columns[columns[table.columns]]
    more, norm = (table.by_row(x[:, labels] - 1, p, rows) for x in (table.numerator, table.denominator))
    total = 1 + (norm * p).sum(-1)
    out = ((more * p) @ few.v.to(p.dtype)).add_(state.out).div_(total.unsqueeze(-1))
    return State(out.to(state.out.dtype), state.lse + total.log())


def _group(part: Part, table: Table, group: int) -> State:
    """Rows of one group: one attention over the columns of each pair of factors."""
    pairs = torch.stack([table.numerator[group], table.denominator[group]], 1)
    pairs, which = torch.unique(pairs, dim=0, return_inverse=True)
    seen = (pairs != 0).any(1).nonzero().squeeze(1)
    states = [plain(part.on(table.column_places(which == one, part.q.device))) for one in seen.tolist()]
    if len(states) == 1 and (pairs[seen] == 1).all():
        return states[0]
    if not states:
        return plain(part.on(slice(0, 0)))
    return combine(states, *(pairs[seen].mT.unsqueeze(-1)))


def _columns(part: Part, table: Table) -> State:
    states, numbers = [], torch.arange(table.numerator.shape[1])
    for group in numbers.tolist():
        some, sees = part.on(table.column_places(numbers == group, part.q.device)), ~table.hidden[:, group]
        states.append(plain(some) if sees.all() else _for_rows(some, table, sees))
    factors = (table.by_row(x, states[0].lse).mT for x in (table.numerator, table.denominator))
    return combine(states, *factors)


def _for_rows(part: Part, table: Table, sees: Tensor) -> State:
    """Some groups of rows; the others see nothing."""
    rows, made = table.row_places(sees, part.q.device), empty(part)
    made.out.zero_()
    made.lse.fill_(-torch.inf)
    made.out[:, :, rows], made.lse[:, :, rows] = plain(part.at(rows))
    return made
