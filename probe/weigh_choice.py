"""Which exact way computes changed attention at least cost, and in which order changes are applied.

Costs are in products of a row and a key, as the plain attention of the rows makes them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from probe import attend
from probe.attend import State
from probe.change import Added, Bias, Factors, Map, Move
from probe.weigh_dense import by_channels, masked
from probe.weigh_parts import base_groups, by_columns, by_rows, plain
from probe.weigh_rows import Part, chunks, explicit_rows
from probe.weigh_table import Table, place_of, table_of

Way = Callable[[Part, Table], State]

_ROWS, _KEYS = 60, 110
"""What a fused attention costs besides its rows and keys, in rows and keys; with the merge of its output (CPU)."""

_WIDER = 150
"""What it costs to make queries and keys with further channels, in keys."""

_MASKED, _EXPLICIT = 1.5, 12.0
"""What attention with a mask, and by explicit weights, cost as multiples of the plain one."""

_GROUPS = 64
"""Groups of rows above which they are not computed one by one."""


def way_of(part: Part) -> tuple[str, Callable[[Part], State]]:
    """The cheapest way to compute all changes of a part, and what it is called."""
    table = table_of(part.some(Factors), part.q.shape[2], part.keys)
    said, way = _own_keys(part, table)
    if not part.some(Added) or way is _explicit:
        return said, lambda part: way(part, table)
    return f"{said} + added keys", lambda part: _with_added(part, way(part, table))


def _own_keys(part: Part, table: Table) -> tuple[str, Way]:
    """All changes but added keys, unless all of them need explicit weights."""
    biases, moves = part.some(Bias), part.some(Move)
    if part.some(Map) or len(moves) > 1 or (moves and (biases or table.raw)):
        return "explicit rows", _explicit
    if (biases or moves) and not table.positive:
        return "explicit rows", _explicit
    if moves:
        return "split by move", _moved
    return ("masked", masked) if biases else cheapest(part, table)


def cheapest(part: Part, table: Table) -> tuple[str, Way]:
    """The cheapest way to compute factors alone."""
    if table.plain:
        return "plain", _plain
    rows, depth = part.q.shape[2:]
    return _cheapest(table, rows, part.keys, depth, part.q.element_size())


@lru_cache(maxsize=64)
def _cheapest(table: Table, rows: int, keys: int, depth: int, size: int) -> tuple[str, Way]:
    parts, base = "gather" if table.hidden.any() else "split", base_groups(table)
    groups = " + ".join(["thin"] * bool(base.columns.any()) + [parts] * bool((~base.rows).any()))
    offers: list[tuple[float, str, Way]] = [  # the simpler ones first
        (_cost_by_rows(table, base.rows, keys), groups, by_rows),
        (_cost_by_columns(table), parts, by_columns),
    ]
    if table.positive:
        channels = min(table.numerator.shape) * (1 if size > 2 else 2)
        wider = 1 + (channels + -(depth + channels) % 8) / depth
        masks = sum(_call(some.stop - some.start, keys) for some in chunks(rows, 4 * keys))
        times = 1 + table.raw
        offers.append((times * _call(rows, keys * wider + _WIDER), "channels", by_channels))
        offers.append((times * _MASKED * masks, "masked", masked))
    else:
        offers.append((_EXPLICIT * rows * keys, "explicit rows", _explicit))
    _, said, way = min(offers, key=lambda offer: offer[0])
    return said, way


def _cost_by_rows(table: Table, base: torch.Tensor, keys: int) -> float:
    others = (~base).nonzero().squeeze(1).tolist()
    if len(others) > _GROUPS:
        return math.inf
    cost = _call(table.row_sizes[base].sum(), keys) if base.any() else 0.0
    for group in others:
        pairs = torch.stack([table.numerator[group], table.denominator[group]])
        _, which = torch.unique(pairs, dim=1, return_inverse=True)
        for one in which[~table.hidden[group]].unique():
            cost += _call(table.row_sizes[group], table.column_sizes[which == one].sum())
    return cost


def _cost_by_columns(table: Table) -> float:
    rows = ((~table.hidden).double() * table.row_sizes[:, None]).sum(0)
    return float(_call(rows, table.column_sizes).sum())


def _call(rows: Any, keys: Any) -> Any:
    """The cost of a fused attention."""
    return (rows + _ROWS) * (keys + _KEYS)


def _plain(part: Part, table: Table) -> State:
    return plain(part)


def _explicit(part: Part, table: Table) -> State:
    return explicit_rows(part)


def _with_added(part: Part, state: State) -> State:
    """Merged with the attention to the added keys, in the rows that see them."""
    for change in part.some(Added):
        rows = slice(None) if change.rows is None else place_of(change.rows.cpu(), part.q.device)
        q = part.at(rows).q
        k, v = (part.of_heads(change, x).to(q.dtype).expand(len(q), -1, -1, -1) for x in (change.k, change.v))
        extra = attend.partial(q, k, v, part.scale)
        own = State(state.out[:, :, rows], state.lse[:, :, rows])
        both = attend.merge(own, extra._replace(lse=extra.lse + change.bias))
        if change.rows is None:
            state = both
        else:
            state.out[:, :, rows], state.lse[:, :, rows] = both
    return state


def _moved(part: Part, table: Table) -> State:
    """Three states, of the source, the target and the other columns, with the mass that moves between the first two."""
    (move,) = part.some(Move)
    source = move.source[: part.keys].cpu()
    target = move.target[: part.keys].cpu() & ~source
    states = [_of_columns(part, table, columns) for columns in (source, target, ~(source | target))]
    total = torch.logsumexp(torch.stack([state.lse for state in states]), 0)
    total_or_zero = total.masked_fill(total.isneginf(), 0.0)
    leaving, there, rest = (torch.exp(state.lse - total_or_zero) for state in states)
    takes = ~states[1].lse.isneginf()
    if move.rows is not None:
        takes = takes & move.rows
    kept = torch.where(takes, move.keep * leaving, leaving)
    weights = (kept, there + (leaving - kept), rest)
    shares = [weight.unsqueeze(-1) * state.out for weight, state in zip(weights, states, strict=True)]
    return State((shares[0] + shares[1] + shares[2]).to(part.q.dtype), total)


def _of_columns(part: Part, table: Table, columns: torch.Tensor) -> State:
    """The changed attention on some columns, bool [M] on the CPU."""
    some = part.on(place_of(columns, part.q.device))
    if not some.keys:
        return plain(some)
    few = table.among(columns)
    return cheapest(some, few)[1](some, few)
