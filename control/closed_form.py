"""Variants in closed form: the identity, uniform and sharpest maps, means and constants, without a second attention."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from control.address import Area, inside
from control.variant import Variant, attended, picked, visible
from probe import attend
from probe.attend import State
from probe.call import AttentionCall
from probe.entry import Place
from probe.errors import PlanError, UsageError
from probe.layout import TokenLayout
from probe.site import JOINT
from probe.word import Prompt

_CHUNK_BYTES = 2**26
"""Most memory that explicit rows take at once."""

_SQUARE = JOINT | {"self"}
"""Kinds whose rows are also their columns."""


@dataclass(frozen=True)
class Identity(Variant):
    """Each token attends to itself, out_i = v_i, or to itself and the columns `beside`.

    With `beside` this is exact for logits that are hidden elsewhere: a_i v_i + (1 - a_i) softmax(beside) V with a_i =
    sigmoid(s_ii - lse_beside); a row inside `beside` sees these alone, itself among them. `raised` is added to the
    logit of the token itself: merged by lse, log(c - 1) multiplies its odds by c.

    Raises:
        PlanError: (when served) with `beside`, another edit changes the weights of the call.
    """

    beside: Area | None = None
    raised: float = 0.0
    kinds = _SQUARE

    def attend(self, call: AttentionCall, entry: int, heads: Place, rows: Place) -> State:
        """One small attention over the columns beside, none without."""
        at, dtype = picked(heads, rows), attend.exact_dtype(call.q.dtype)
        q, k, v = (x[entry][at] for x in (call.q, call.k, call.v))
        alone = State(v, (q.to(dtype) * k.to(dtype)).sum(-1) * attend.scale_of(call.q, call.scale) + self.raised)
        if self.beside is None:
            return alone
        _refuse_changed(self, call, entry)
        columns = inside(self.beside, call, entry, "columns")
        counted = columns[rows].expand_as(alone.lse)
        other = attended(call, entry, heads, rows, columns)
        return attend.merge(State(v, alone.lse.masked_fill(counted, -math.inf)), other)

    def cost(self, layout: TokenLayout) -> float:
        """The text where there are columns beside."""
        return 0.0 if self.beside is None else layout.text / layout.total

    def __str__(self) -> str:
        return "Identity" if self.beside is None else f"Identity beside {self.beside}"


class Within(Variant):
    """The probability that a row puts on `columns` is spread over by another `variant`; the rest is as ever:
    out_i = m_i out_variant,i + sum_{j not in columns} p_ij v_j, m_i the row's own mass on the columns.

    Raises:
        PlanError: (when served) another edit changes the weights of the call.
    """

    def __init__(self, variant: Variant, columns: Area) -> None:
        self.variant, self.columns, self.kinds = variant, columns, variant.kinds

    def begin(self, prompts: Sequence[Prompt], steps: int, layers: int) -> None:
        """Tell the variant that a run starts."""
        self.variant.begin(prompts, steps, layers)

    def end(self) -> None:
        """Tell the variant that it ends."""
        self.variant.end()

    def attend(self, call: AttentionCall, entry: int, heads: Place, rows: Place) -> State | None:
        """Two attentions that share the keys, for the mass and for the rest, and the variant's."""
        _refuse_changed(self, call, entry)
        made = self.variant.attend(call, entry, heads, rows)
        if made is None:
            return None
        within = inside(self.columns, call, entry, "columns")
        mine, rest = (attended(call, entry, heads, rows, columns) for columns in (within, ~within))
        return attend.merge(State(made.out, mine.lse), rest)

    def cost(self, layout: TokenLayout) -> float:
        """One attention, in parts, and the variant's."""
        return 1.0 + self.variant.cost(layout)

    def __str__(self) -> str:
        return f"{self.variant} within {self.columns}"


@dataclass(frozen=True)
class Uniform(Variant):
    """Every row attends equally to all keys it may see, or to those in `columns`: the mean of their values.

    Its lse is that of logits 0, the log of their number.

    Raises:
        UsageError: (when served) an area without a key.
    """

    columns: Area | None = None

    def attend(self, call: AttentionCall, entry: int, heads: Place, rows: Place) -> State:
        """The mean of the values, for each row."""
        values = visible(call.v[entry], call, entry, self.columns)[heads]
        if not values.shape[1]:
            raise UsageError(f"Uniform attention must have keys. Got none in {self.columns} at {call.site}. Widen it.")
        q = call.q[entry][picked(heads, rows)]
        mean = values.to(attend.exact_dtype(values.dtype)).mean(1, keepdim=True)
        return State(mean.expand(q.shape), mean.new_full(q.shape[:-1], math.log(values.shape[1])))


class Sharpest(Variant):
    """Every row attends to the one key with its largest logit, the first of equals. Its lse is that logit.

    Raises:
        PlanError: (when served) another edit changes the weights of the call.
    """

    def attend(self, call: AttentionCall, entry: int, heads: Place, rows: Place) -> State:
        """Explicit logits, some rows at a time."""
        _refuse_changed(self, call, entry)
        k, v = (visible(x[entry], call, entry)[heads] for x in (call.k, call.v))
        dtype = attend.exact_dtype(k.dtype)
        q, keys, scale = call.q[entry][picked(heads, rows)].to(dtype), k.to(dtype).mT, attend.scale_of(k, call.scale)
        best = [(q[:, part] @ keys * scale).max(-1) for part in _chunks(q.shape[1], keys.shape[0] * keys.shape[2])]
        keys = torch.cat([chunk.indices for chunk in best], 1)
        out = v.gather(1, keys.unsqueeze(-1).expand(*keys.shape, v.shape[-1]))
        return State(out, torch.cat([chunk.values for chunk in best], 1))

    def cost(self, layout: TokenLayout) -> float:
        """Half the products of an attention, but with the logits in memory: counted as a whole one."""
        return 1.0


@dataclass(frozen=True)
class MeanOf(Variant):
    """Every row gives the mean of the output over the rows of an area, or over all that are not hidden (mean ablation);
    `logit` is its lse.

    Raises:
        UsageError: (when served) an area without a row.
    """

    area: Area | None = None
    logit: float = 0.0

    def attend(self, call: AttentionCall, entry: int, heads: Place, rows: Place) -> State:
        """No attention: the output is there."""
        assert call.out is not None
        seen = call.sides(entry)[0].total
        some = call.out[entry][heads][:, :seen][:, inside(self.area, call, entry)[:seen]]
        if not some.shape[1]:
            raise UsageError(f"A mean must have rows. Got none in {self.area} at {call.site}. Widen it.")
        mean = some.to(attend.exact_dtype(some.dtype)).mean(1, keepdim=True)
        shape = call.q[entry][picked(heads, rows)].shape
        return State(mean.expand(shape), mean.new_full(shape[:-1], self.logit))


@dataclass(frozen=True)
class Fixed(Variant):
    """Every row gives the same `value`: a number, or a tensor [H, D], or [H, N, D] with one for each row. Merged by lse
    it is one more key with this `logit`, a null key (sink) where the value is 0.
    """

    value: float | Tensor = 0.0
    logit: float = 0.0

    def attend(self, call: AttentionCall, entry: int, heads: Place, rows: Place) -> State:
        """No attention."""
        whole = call.q[entry]
        value = torch.as_tensor(self.value, dtype=attend.exact_dtype(whole.dtype), device=whole.device)
        value = value.unsqueeze(1) if value.dim() == 2 else value
        out = value.expand(whole.shape)[picked(heads, rows)]
        return State(out, out.new_full(out.shape[:-1], self.logit))


def _chunks(rows: int, numbers: int) -> Iterator[slice]:
    """Slices of rows with `numbers` numbers each that fit the memory."""
    size = max(1, _CHUNK_BYTES // (4 * max(1, numbers)))
    return (slice(at, at + size) for at in range(0, rows, size))


def _refuse_changed(variant: Variant, call: AttentionCall, entry: int) -> None:
    if any(change.entry == entry for change in call.changes):
        raise PlanError(
            f"{variant} must meet a call whose weights no other edit changes. Got changed weights at {call.site}. "
            "Separate their steps, layers or branches."
        )
