"""Fork: attend in another way too, and mix the two outputs."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from control.address import Gate, gate_of, inside
from control.edit import Edit
from control.variant import Variant, attended, head_place, picked, places
from probe import attend
from probe.call import AttentionCall
from probe.errors import UsageError
from probe.layout import TokenLayout
from probe.plan import Stage
from probe.site import Branch
from probe.word import Prompt

Merge = Literal["blend", "lse", "add"]


@dataclass(eq=False)
class Fork(Edit):
    """O <- (1 - w) O + w O_variant in the selected heads and rows, with w = gate x strength.

    `gate` is an area, or a weight in [0, 1] per row or video token; rows of weight 0 are not attended and keep their
    bits, so that a binary mask costs its share of the rows. `merge`: "blend" as above, also equal to mixing the two
    maps where both have the same values; "lse" multiplies w by sigmoid(lse_variant - lse_own): the keys of both in one
    softmax, at the cost of one more attention for lse_own; "add" is O + w O_variant, for maps in parts. A variant that
    needs no attention costs none. Two Forks at the same rows clash.

    Raises:
        UsageError: an unknown merge.
    """

    variant: Variant
    gate: Gate | None = field(default=None, kw_only=True)
    merge: Merge = field(default="blend", kw_only=True)
    stage: Stage = field(default=Stage.MERGE, init=False)
    rank = 1
    touches = frozenset({"out"})

    def __post_init__(self) -> None:
        if self.merge not in get_args(Merge):
            raise UsageError(f"A Fork must merge by blend, lse or add. Got {self.merge!r}. Choose one.")
        self.kinds = self.variant.kinds

    def __str__(self) -> str:
        return f"Fork({self.variant}{'' if self.merge == 'blend' else f' by {self.merge}'})"

    def begin(self, prompts: Sequence[Prompt], steps: int, layers: int) -> None:
        """Tell the variant that a run starts."""
        super().begin(prompts, steps, layers)
        self.variant.begin(prompts, steps, layers)

    def end(self) -> None:
        """Tell the variant that it ends."""
        self.variant.end()

    def treats(self, branch: Branch) -> Hashable:
        """Whether it is selected, and what the variant does to it."""
        return super().treats(branch), self.variant.treats(branch)

    def met(self, call: AttentionCall, rows: tuple[int, ...]) -> bool:
        """Whether an edit of the variant was there too, wherever the variant was asked for."""
        return self.variant.met

    def cost(self, layout: TokenLayout) -> float:
        """That of the variant, and the normaliser for merges by lse."""
        return self.variant.cost(layout) + (self.merge == "lse")

    def apply(self, call: AttentionCall, entry: int, amount: float) -> None:
        """Mix the output of one batch entry. Sums are kept in float32 and rounded once."""
        assert call.out is not None
        dtype, heads = attend.exact_dtype(call.out.dtype), head_place(call, self.heads(call))
        weight = self._weight(call, entry).to(dtype) * amount
        whole = self.rows is None and self.gate is None
        rows = slice(None) if whole else places(weight != 0)
        if not whole and not weight[rows].numel():
            return
        made = self.variant.attend(call, entry, heads, rows)
        if made is None:
            return
        share = weight[rows].expand(made.lse.shape)
        if self.merge == "lse":
            share = share * torch.sigmoid(made.lse - attended(call, entry, heads, rows).lse)
        at, share = picked(heads, rows), share.unsqueeze(-1)
        own = call.out[entry][at].to(dtype)
        mixed = (own if self.merge == "add" else (1 - share) * own) + share * made.out
        call.writable("out")[entry][at] = mixed.to(call.out.dtype)

    def _weight(self, call: AttentionCall, entry: int) -> Tensor:
        """w of each row [N] before the strength."""
        return gate_of(self.gate, call, entry) * inside(self.rows, call, entry)
