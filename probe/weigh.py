"""Attention whose weights were changed: biases, masks, reweighting, added keys, maps. The only place that computes it.

A change is data about one batch entry. Changes of an entry compose: factors multiply, biases add, then added keys join
the softmax, then mass moves, then maps apply. Shapes: q [B, H, N, D]; k, v [B, H, M, D].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from probe import attend
from probe.call import AttentionCall
from probe.entry import index_of

_CHUNK_BYTES = 2**26
"""Most memory that explicit rows take at once."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """What an edit does to the weights of batch entry `entry`, at `heads` (None: all)."""

    entry: int
    heads: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Factors(Change):
    """exp(logit) of row i and column j is multiplied by numerator[g, c] in the output and by denominator[g, c] in the
    normaliser, with g = rows[i] and c = columns[j].

    `rows` is long [N] (None: all 0), `columns` long [M], the tables [R, C] float32. Equal tables renormalise (a bias of
    log factor; 0 hides); a denominator of 1 leaves the rows without unit sum (raw reweighting; may be negative).
    """

    rows: Tensor | None = None
    columns: Tensor
    numerator: Tensor
    denominator: Tensor


@dataclass(frozen=True, kw_only=True)
class Bias(Change):
    """Added to the logits: `of(rows)` gives [n, M] or [H, n, M] for a slice of rows; -inf hides."""

    of: Callable[[slice], Tensor]


@dataclass(frozen=True, kw_only=True)
class Added(Change):
    """Further keys [H, m, D] and values [H, m, D], whose logits are raised by `bias`; `rows` (bool [N], None: all) see
    them.
    """

    k: Tensor
    v: Tensor
    bias: float = 0.0
    rows: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Move(Change):
    """Columns `source` (bool [M]) keep `keep` of their probability; what they lose goes to the columns `target` in
    proportion to theirs, in rows `rows` (bool [N], None: all). Where the target has no mass the source keeps its own.
    """

    source: Tensor
    target: Tensor
    keep: float
    rows: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Map(Change):
    """Any function of the weights: `of(weights, rows)` maps [h, n, M] of a slice of rows to the same shape."""

    of: Callable[[Tensor, slice], Tensor]


def run(call: AttentionCall) -> str:
    """Compute `call.out` with all its changes; says how. Entries and heads without changes get the plain kernel."""
    out, lse = torch.empty_like(call.q), call.q.new_empty(call.q.shape[:-1], dtype=attend.exact_dtype(call.q.dtype))
    for entry in range(len(call.q)):
        state = attention(call, entry)
        out[entry], lse[entry] = state
    call.out, call._lse = out, lse  # noqa: SLF001
    return "explicit rows"


def attention(call: AttentionCall, entry: int) -> attend.State:
    """One entry with its changes: out [H, N, D] and the lse [H, N] of its normaliser."""
    raise NotImplementedError
