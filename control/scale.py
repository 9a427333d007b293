"""Scale: queries, keys, values or outputs times a factor. Temperature, head multipliers and head routing are this."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from control.address import Side, inside
from control.edit import Edit
from probe import attend
from probe.call import AttentionCall
from probe.entry import index_of, on_device
from probe.errors import UsageError
from probe.plan import Stage

Scaled = Literal["q", "k", "v", "o"]
Factor = float | Sequence[float] | Tensor
"""One number, one per selected head (ascending), or a tensor with one per token: [N], [frames, h, w] for the video, or
[heads, N].
"""


@dataclass(eq=False)
class Scale(Edit):
    """`tensor` is multiplied by `factor` in the selected heads and tokens; strength s makes that 1 + s (factor - 1).

    - q: the logits of a row become sharper (> 1) or flatter (< 1); 0 is uniform attention.
    - k: the logits of a column; those that are negative sink as the others rise.
    - v: how much a column counts, without renormalising (prompt-to-prompt's reweighting); may be negative.
    - o: the contribution of a head; 0 ablates it.

    `rows` are tokens of the queries for q and o, of the keys for k and v. Several at one place multiply. Costs no
    attention.

    Raises:
        UsageError: an unknown tensor; (when served) as many factors as neither the heads nor the tokens.
    """

    tensor: Scaled
    factor: Factor
    composes = True

    def __post_init__(self) -> None:
        if self.tensor not in get_args(Scaled):
            raise UsageError(f"A Scale must name one tensor of q, k, v, o. Got {self.tensor!r}. Use one for each.")
        output = self.tensor == "o"
        self.stage, self.rank = (Stage.MERGE, 2) if output else (Stage.EDIT, 4)
        self.touches = frozenset({"out" if output else self.tensor})
        self.side: Side = "columns" if self.tensor in "kv" else "rows"

    def __str__(self) -> str:
        many = not isinstance(self.factor, int | float)
        return f"{type(self).__name__}({self.tensor} by {'many factors' if many else self.factor})"

    def extent(self, call: AttentionCall, row: int) -> Tensor | None:
        """bool, one per query (q, o) or key (k, v): the tokens it changes."""
        return None if self.rows is None else inside(self.rows, call, row, self.side)

    def apply(self, call: AttentionCall, entry: int, amount: float) -> None:
        """Multiply one batch entry in place. The product is rounded once."""
        if isinstance(self.factor, int | float) and self.factor == 1:
            return
        (name,) = self.touches
        tensor = call.writable(name)[entry]
        dtype = attend.exact_dtype(tensor.dtype)
        factors = torch.ones(tensor.shape[:2], dtype=dtype, device=tensor.device)
        within = inside(self.rows, call, entry, self.side)
        change = 1 + amount * (self._given(call, dtype) - 1)
        factors[index_of(self.heads(call), tensor.device)] = torch.where(within, change, 1.0)
        tensor.mul_(factors.unsqueeze(-1))

    def _given(self, call: AttentionCall, dtype: torch.dtype) -> Tensor:
        """The factors as [heads or 1, tokens or 1]."""
        device, tokens, heads = call.q.device, getattr(call, self.side), len(self.heads(call))
        if isinstance(self.factor, int | float):
            return on_device((float(self.factor),), dtype, device).view(1, 1)
        if not isinstance(self.factor, Tensor):
            if len(self.factor) != heads:
                raise UsageError(
                    f"A Scale must have one factor per selected head, {heads}. Got {len(self.factor)}. Give one "
                    "number, or choose the heads with where."
                )
            return on_device(tuple(map(float, self.factor)), dtype, device).view(-1, 1)
        given = self.factor.to(device, dtype)
        if given.shape in ((tokens.total,), (heads, tokens.total)):
            return given.view(-1, tokens.total)
        if not tokens.video:
            return given.new_ones(1, 1)
        if given.shape != tokens.grid.shape:
            raise UsageError(
                f"A tensor of factors must be of shape {(tokens.total,)}, {tokens.grid.shape} or "
                f"{(heads, tokens.total)}. Got {tuple(given.shape)}. Give factors of whole heads as a list."
            )
        full = given.new_ones(tokens.total)
        full[tokens.video_slice] = given.reshape(-1)
        return full.view(1, -1)


@dataclass(eq=False)
class Temper(Scale):
    """Logits times `factor`, by scaling q: above 1 sharper, 1 unchanged, 0 uniform attention. The temperature is
    1 / factor.
    """

    tensor: Literal["q"] = field(default="q", init=False)
    factor: Factor = 1.0


def multipliers(qk: Factor = 1.0, vo: Factor = 1.0, **address: Any) -> tuple[Scale, Scale]:
    """Per head: `qk` multiplies the logits (0: uniform attention), `vo` the contribution (0: the head is ablated).

    `address` is `rows`, `strength` and `where` of both edits.
    """
    return Temper(qk, **address), Scale("o", vo, **address)


def head_router_factors(cosines: Sequence[float], gamma: float = 0.2, delta: float = 0.5) -> tuple[float, ...]:
    """Factors of head outputs, 1 + gamma sigmoid(d - delta), d = (max - s) / (max - min) of the heads' cosines s
    between a reconstructing and an editing branch, each the mean over the video rows.

    Where all cosines are equal no head stands out and d is 0. HeadRouter (arXiv 2411.15034) as far as it was released:
    the code of its attention call is missing, so the formula is the paper's and its results are not reproduced.

    Raises:
        UsageError: no cosine, or one outside [-1, 1].
    """
    if not len(cosines) or not all(-1 - 1e-6 <= s <= 1 + 1e-6 for s in cosines):
        raise UsageError(f"Cosines must be one per head in -1 to 1. Got {list(cosines)}. Compare the heads' outputs.")
    top, spread = max(cosines), max(cosines) - min(cosines)
    apart = [(top - s) / spread if spread else 0.0 for s in cosines]
    return tuple(1 + gamma / (1 + math.exp(delta - d)) for d in apart)
