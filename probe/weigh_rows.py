"""Changed attention by explicit weights, a few rows at a time: any change, slowly."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from probe import attend
from probe.attend import State
from probe.change import Added, Bias, Change, Factors, Map, Move
from probe.entry import Place

Kind = TypeVar("Kind", bound=Change)

_CHUNK_BYTES = 2**26
"""Most memory that one tensor of explicit weights takes."""


@dataclass(frozen=True)
class Part:
    """Some batch entries and heads whose weights change in the same way: q [B, h, N, D]; k, v [B, h, M, D], the keys
    that may be seen. `heads` are their places in the call, `changes` those of the first entry.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    heads: tuple[int, ...]
    changes: Sequence[Change]

    @property
    def keys(self) -> int:
        """Keys that may be seen."""
        return self.k.shape[-2]

    def at(self, rows: Place) -> Part:
        """Some rows only."""
        return replace(self, q=_taken(self.q, rows))

    def on(self, columns: Place) -> Part:
        """Some columns only."""
        return replace(self, k=_taken(self.k, columns), v=_taken(self.v, columns))

    def some(self, kind: type[Kind]) -> list[Kind]:
        """The changes of one kind, in order."""
        return [change for change in self.changes if isinstance(change, kind)]

    def of_heads(self, change: Change, tensor: Tensor) -> Tensor:
        """The places of this part on the first axis of a tensor that has one for each head of the change, or of the
        call.
        """
        apart = change.heads is not None and len(tensor) == len(change.heads)
        heads = list(change.heads or ()) if apart else list(range(len(tensor)))
        return tensor if heads == list(self.heads) else tensor[[heads.index(head) for head in self.heads]]


def explicit_rows(part: Part) -> State:
    """Output [B, h, N, D] and log-normaliser [B, h, N]; 0 and -inf in rows that see nothing."""
    acc = attend.exact_dtype(part.q.dtype)
    out, lse = torch.empty_like(part.q), part.q.new_empty(part.q.shape[:-1], dtype=acc)
    k, v = part.k.to(acc), part.v.to(acc)
    added = [(change, *(part.of_heads(change, x).to(acc) for x in (change.k, change.v))) for change in part.some(Added)]
    for rows in chunks(part.q.shape[2], part.q[:, :, 0, 0].numel() * part.keys * k.element_size()):
        q = part.q[:, :, rows].to(acc)
        logits = q @ k.mT * part.scale
        for bias in part.some(Bias):
            logits += bias_of(part, bias, rows).to(acc)
        numerator, denominator = factors_of(part, rows, acc)
        logits = logits.masked_fill((numerator == 0) & (denominator == 0), -math.inf)
        extra = [_seen(change, rows, q @ keys.mT * part.scale + change.bias) for change, keys, _ in added]
        top = torch.cat([logits, *extra], -1).amax(-1, keepdim=True)
        top = top.masked_fill(top.isneginf(), 0.0)
        odds = (logits - top).exp_()
        total = (odds * denominator).sum(-1, keepdim=True)
        shares = [(one - top).exp_() for one in extra]
        total = total + sum(share.sum(-1, keepdim=True) for share in shares)
        weights = _over(odds * numerator, total)
        for move in part.some(Move):
            weights = moved(weights, move, rows)
        for mapped in part.some(Map):
            weights = torch.stack([mapped.of(one, rows) for one in weights])
        made = weights @ v
        for share, (_, _, values) in zip(shares, added, strict=True):
            made += _over(share, total) @ values
        out[:, :, rows], lse[:, :, rows] = made.to(out.dtype), (total.log() + top).squeeze(-1)
    return State(out, lse)


def chunks(rows: int, row_bytes: int) -> Iterator[slice]:
    """Slices of rows whose explicit weights stay within memory, never all rows at once."""
    step = max(1, min(_CHUNK_BYTES // max(row_bytes, 1), -(-rows // 4)))
    return (slice(at, min(at + step, rows)) for at in range(0, rows, step))


def factors_of(part: Part, rows: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Products of all numerators and of all denominators, [n, M] each."""
    numerator, denominator = (torch.ones(1, 1, dtype=dtype, device=part.q.device) for _ in range(2))
    for change in part.some(Factors):
        columns = change.columns[: part.keys]
        at = columns.new_zeros(1, 1) if change.rows is None else change.rows[rows, None]
        numerator = numerator * change.numerator.to(columns.device, dtype)[at, columns]
        denominator = denominator * change.denominator.to(columns.device, dtype)[at, columns]
    return numerator, denominator


def bias_of(part: Part, bias: Bias, rows: slice) -> Tensor:
    """[n, M] or [h, n, M], for the keys that may be seen."""
    added = bias.of(rows)[..., : part.keys]
    return added if added.dim() == 2 else part.of_heads(bias, added)


def moved(weights: Tensor, move: Move, rows: slice) -> Tensor:
    """Weights [B, h, n, M] after a move of mass."""
    source = move.source[: weights.shape[-1]]
    target = move.target[: weights.shape[-1]] & ~source
    leaving, there = (weights[..., side].sum(-1, keepdim=True) for side in (source, target))
    takes = there > 0 if move.rows is None else (there > 0) & move.rows[rows, None]
    lost = (1 - move.keep) * takes.to(weights.dtype)
    gain = torch.where(takes, lost * leaving / there, 0.0)
    return weights * (1 - lost * source + gain * target)


def _taken(tensor: Tensor, tokens: Place) -> Tensor:
    """Some tokens of [B, h, N, D]; far quicker than by plain indexing."""
    return tensor[:, :, tokens] if isinstance(tokens, slice) else tensor.index_select(2, tokens)


def _seen(change: Added, rows: slice, logits: Tensor) -> Tensor:
    return logits if change.rows is None else logits.masked_fill(~change.rows[rows, None], -math.inf)


def _over(weights: Tensor, total: Tensor) -> Tensor:
    """Divided by their total; 0 where a row sees nothing."""
    return torch.where(total > 0, weights / total, 0.0)
