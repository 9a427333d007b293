"""A source that is no branch: zeros, the mean of one's own rows, or numbers that are given."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from control.address import inside
from control.bank import Given, own_of
from control.source import Ask, Source
from probe import attend
from probe.call import AttentionCall
from probe.errors import UsageError


@dataclass(eq=False)
class Constant(Source):
    """The same for every row: the "mean" over the rows that are changed and not hidden (of q over the video: SEG, arXiv
    2408.00760, with infinite blur), "zero", or a tensor [D], [H, D] or [H, N, D] with H and N of the whole call.

    Raises:
        UsageError: another word, or (when served) a tensor of another shape.
    """

    value: Literal["mean", "zero"] | Tensor

    def __post_init__(self) -> None:
        if isinstance(self.value, str) and self.value not in ("mean", "zero"):
            raise UsageError(f"A constant must be 'mean', 'zero' or a tensor. Got {self.value!r}. Choose one of them.")

    def __str__(self) -> str:
        return self.value if isinstance(self.value, str) else f"tensor {tuple(self.value.shape)}"

    def given(self, call: AttentionCall, entry: int, ask: Ask) -> Given:
        """The constant for every row, as views."""
        own = own_of(call, entry, ask.names, ask.heads)
        made = {name: self._like(own.take(name, ask.heads), name, call, entry, ask) for name in ask.names}
        return replace(own, tensors=made)

    def _like(self, own: Tensor, name: str, call: AttentionCall, entry: int, ask: Ask) -> Tensor:
        if isinstance(self.value, Tensor):
            return self._fit(own, call.q.shape[1], ask.heads)
        if self.value == "zero":
            return torch.zeros_like(own[:, :1]).expand_as(own)
        seen = call.sides(entry)[name in "kv"].total
        rows = inside(ask.rows, call, entry, "columns" if name in "kv" else "rows")[:seen].unsqueeze(-1)
        exact = own[:, :seen].to(attend.exact_dtype(own.dtype))
        mean = (exact * rows).sum(1, keepdim=True) / rows.sum().clamp_min(1)
        return mean.to(own.dtype).expand_as(own)

    def _fit(self, own: Tensor, heads: int, chosen: tuple[int, ...]) -> Tensor:
        assert isinstance(self.value, Tensor)
        shape, value = (heads, *own.shape[1:]), self.value.to(own.device, own.dtype)
        if tuple(value.shape) not in (shape[2:], (shape[0], shape[2]), shape):
            raise UsageError(
                f"A constant must be of shape {list(shape[2:])}, {[shape[0], shape[2]]} or {list(shape)}. Got "
                f"{list(value.shape)}. Give one vector per head, or one for all."
            )
        value = value.unsqueeze(1) if value.dim() == 2 else value
        return value.expand(shape)[list(chosen)]
