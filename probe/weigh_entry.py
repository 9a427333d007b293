"""Entries whose weights were changed, so that every readout sees the weights the model used.

Factors become extra channels of q and k, which add their logarithms to the logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from probe.change import Added, Change, Factors
from probe.entry import Entry, on_device
from probe.errors import PlanError
from probe.weigh_table import Table, table_of, widened

_HIDDEN = -80.0
"""Logarithm of a factor of 0, in nats: no weight is left, and expected keys stay exact."""


def extra_channels(changes: Sequence[Change], rows: int, keys: int, dtype: torch.dtype) -> int:
    """Channels that the factors of one entry need."""
    tables = (table_of([change], rows, keys) for change in changes if isinstance(change, Factors))
    return sum(min(table.numerator.shape) for table in tables) * (2 if dtype.itemsize == 2 else 1)


def reweighted(entry: Entry, changes: Sequence[Change], extra: int) -> Entry:
    """An entry with the changes that its heads have, its q, k and v wider by at least `extra` channels.

    Raises:
        PlanError: a change that q and k cannot carry.
    """
    changes = [change for change in changes if change.heads is None or set(change.heads) & set(entry.heads)]
    factors = [change for change in changes if isinstance(change, Factors)]
    tables = [(change, table_of([change], entry.rows.total, entry.keys)) for change in factors]
    for change in changes:
        if not isinstance(change, Factors | Added):
            raise PlanError(_unreadable(entry, f"a {type(change).__name__.lower()} of weights"))
    if not all(table.positive for _, table in tables):
        raise PlanError(_unreadable(entry, "negative weights"))
    sides = [_of_heads(entry, change, table) for change, table in tables]
    extra += -(entry.q.shape[-1] + extra) % 8  # what fused kernels need
    q, k = (widened(x, [side[i] for side in sides], extra) for i, x in enumerate((entry.q, entry.k)))
    blind = (table_of(factors, entry.rows.total, entry.keys).numerator == 0).all(1).any()
    whole = not (blind or any(table.raw for _, table in tables) or any(isinstance(change, Added) for change in changes))
    return replace(entry, q=q, k=k, v=widened(entry.v, [], extra), extra=extra, whole=whole)


def _of_heads(entry: Entry, change: Factors, table: Table) -> tuple[Tensor, Tensor]:
    """Channels of q [H, N, r], 0 in heads without the change, and of k [M, r]."""
    u, w = table.channels(table.numerator.log().clamp_min(_HIDDEN), entry.q, entry.scale)
    has = tuple(float(change.heads is None or head in change.heads) for head in entry.heads)
    return u * on_device(has, u.dtype, u.device)[:, None, None], w


def _unreadable(entry: Entry, what: str) -> str:
    return (
        f"A readout of the attention used must see changes that are factors or added keys. Got {what} at {entry.site} "
        f"for {entry.branch}. Read the model's own attention with stage=Stage.BEFORE."
    )
