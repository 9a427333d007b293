"""What edits do to attention weights, as data: factors, biases, added keys, moved mass, maps.

A change is about one batch entry. Changes of an entry compose: factors multiply, biases add, then added keys join the
softmax, then mass moves, then maps apply. `probe.weigh` computes what they say, and keeps some of it: nothing may write
into the tensors of a change.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Change:
    """What an edit does to the weights of batch entry `entry`, at `heads` (None: all). Tensors and functions that have
    an axis of heads have one place for each of these.
    """

    entry: int
    heads: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
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


@dataclass(frozen=True, kw_only=True, eq=False)
class Bias(Change):
    """Added to the logits: `of(rows)` gives [n, M] or [h, n, M] for a slice of rows; -inf hides."""

    of: Callable[[slice], Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class Added(Change):
    """Further keys [h, m, D] and values [h, m, D], whose logits are raised by `bias`; `rows` (bool [N], None: all) see
    them.
    """

    k: Tensor
    v: Tensor
    bias: float = 0.0
    rows: Tensor | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Move(Change):
    """Columns `source` (bool [M]) keep `keep` of their probability; what they lose goes to the columns `target` in
    proportion to theirs, in rows `rows` (bool [N], None: all). Where the target has no mass the source keeps its own;
    a column of both is a source.
    """

    source: Tensor
    target: Tensor
    keep: float
    rows: Tensor | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Map(Change):
    """Any function of the weights of the call's own columns: `of(weights, rows)` maps [h, n, M] of a slice of rows to
    the same shape, in float32 (float64 for float64). Keys that are hidden or added are left out. Heads that share all
    their changes come together.
    """

    of: Callable[[Tensor, slice], Tensor]
