"""Exact ways to compute attention with biases: extra channels of q and k, or a mask a few rows at a time.

Each gives the output [B, h, N, D] and the log-normaliser [B, h, N]; a row that sees nothing gets 0 and -inf.
"""

from __future__ import annotations

import torch
from torch import Tensor

from probe import attend
from probe.attend import State
from probe.change import Bias
from probe.weigh_parts import empty
from probe.weigh_rows import Part, bias_of, chunks
from probe.weigh_table import Table, widened


def by_channels(part: Part, table: Table) -> State:
    """Extra channels of q and k add the logarithms of the factors, which are >= 0."""
    state = _on_channels(part, table, table.denominator)
    return _raw(_on_channels(part, table, table.numerator), state.lse) if table.raw else state


def masked(part: Part, table: Table) -> State:
    """Biases, and the logarithms of factors >= 0, are added to the logits of some rows at a time."""
    made, biases = empty(part), part.some(Bias)
    apart = max(
        (len(one) for one in (bias_of(part, bias, slice(0, 1)) for bias in biases) if one.dim() == 3), default=1
    )
    for rows in chunks(part.q.shape[2], 4 * part.keys * apart):
        some, added = part.at(rows), [bias_of(part, bias, rows) for bias in biases]
        state = _on_bias(some, [*added, _spread(table, table.denominator, rows, part.q)])
        if table.raw:
            state = _raw(_on_bias(some, [*added, _spread(table, table.numerator, rows, part.q)]), state.lse)
        made.out[:, :, rows], made.lse[:, :, rows] = state
    return made


def _on_channels(part: Part, table: Table, factors: Tensor) -> State:
    u, w = table.channels(factors.log(), part.q, part.scale)
    depth = part.q.shape[-1]
    extra = u.shape[1] + -(depth + u.shape[1]) % 8  # what fused kernels need
    q, k, v = widened(part.q, [u], extra), widened(part.k, [w], extra), widened(part.v, [], extra)
    out, lse = attend.partial(q, k, v, part.scale)
    blind = table.by_row((factors == 0).all(1).float(), part.q) > 0
    return State(out[..., :depth].masked_fill(blind.unsqueeze(-1), 0.0), lse.masked_fill(blind, -torch.inf))


def _on_bias(part: Part, biases: list[Tensor]) -> State:
    acc = attend.exact_dtype(part.q.dtype)
    bias = sum((one.to(acc) for one in biases[1:]), biases[0].to(acc))
    return attend.partial(part.q, part.k, part.v, part.scale, bias[None, None] if bias.dim() == 2 else bias[None])


def _spread(table: Table, factors: Tensor, rows: slice, like: Tensor) -> Tensor:
    """log of the factors of some rows [n, M]."""
    like = like.new_empty(0, dtype=attend.exact_dtype(like.dtype))
    return table.by_column(table.by_row(factors.log(), like, rows).mT, like).mT


def _raw(state: State, lse: Tensor) -> State:
    """The output of a state as its share of another normaliser, and that normaliser."""
    share = torch.where(lse.isneginf(), 0.0, torch.exp(state.lse - lse))
    return State((state.out.to(share.dtype) * share.unsqueeze(-1)).to(state.out.dtype), lse)
