"""Sparsify: each row keeps its largest weights only."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from control.address import inside
from control.edit import Edit
from probe.call import AttentionCall
from probe.change import Map
from probe.errors import UsageError
from probe.layout import TokenLayout


@dataclass(eq=False)
class Sparsify(Edit):
    """Each row keeps its ceil(`keep` M) largest weights of M visible keys, at least one; the others become 0. Weights
    equal to the last one kept stay too.

    With `renormalise` the rows are divided by what is left, as if the other keys were hidden; without, they lose their
    unit sum. The strength, 0 to 1, hides softly: the others are multiplied by 1 - strength. The weights are those after
    all other edits of them. Explicit rows: exact, and slow.

    One layer at a time this is the sensitivity of a layer to sparsity, as in the analysis of arXiv 2504.10317, where 10
    % less in all layers of Mochi already shows and two layers are the cause.

    Raises:
        UsageError: a share outside 0 to 1, or (when served) a strength outside 0 to 1.
    """

    keep: float
    renormalise: bool = field(default=True, kw_only=True)
    rank = 6
    touches = frozenset({"weights"})

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise UsageError(f"A share of weights to keep must lie above 0 and up to 1. Got {self.keep}. 1 keeps all.")

    def __str__(self) -> str:
        return f"Sparsify(keep {self.keep:g})"

    def cost(self, layout: TokenLayout) -> float:
        """Explicit rows, whose order is found: about four more attentions."""
        return 4.0

    def apply(self, call: AttentionCall, entry: int, amount: float) -> None:
        """Tell the call its map; nothing where all weights are kept."""
        if not 0 <= amount <= 1:
            raise UsageError(f"The strength of {self} must lie in 0 to 1. Got {amount:g}. 1 hides fully.")
        if self.keep == 1:
            return
        within = inside(self.rows, call, entry)

        def of(weights: Tensor, rows: slice) -> Tensor:
            return torch.where(within[rows].unsqueeze(-1), self._sparse(weights, amount), weights)

        heads = None if self.where.heads is None else self.heads(call)
        call.change(Map(entry=entry, heads=heads, of=of))

    def _sparse(self, weights: Tensor, amount: float) -> Tensor:
        """Weights [..., M] of which the strongest are kept."""
        keys = weights.shape[-1]
        kept = max(1, math.ceil(round(self.keep * keys, 6)))
        least = weights.kthvalue(keys - kept + 1, dim=-1, keepdim=True).values
        made = torch.where(weights >= least, weights, (1 - amount) * weights)
        if not self.renormalise:
            return made
        left = made.sum(-1, keepdim=True)
        return torch.where(left == 0, made, made * (weights.sum(-1, keepdim=True) / left))
