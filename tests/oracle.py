"""Slow and obvious: float64, the whole N x N matrix, one loop at a time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def weights(q: Tensor, k: Tensor) -> Tensor:
    """The attention matrix, float64 [B, H, N, M]."""
    return torch.softmax(q.double() @ k.double().transpose(-1, -2) / q.shape[-1] ** 0.5, -1)


@contextmanager
def patched_attention(replacement: Callable[..., Tensor]):
    """F.scaled_dot_product_attention replaced by `replacement(plain, q, k, v, **rest)`, without any of the project's
    code.
    """
    plain = F.scaled_dot_product_attention

    def call(query: Tensor, key: Tensor, value: Tensor, **rest: Any) -> Tensor:
        return replacement(plain, query, key, value, **rest)

    F.scaled_dot_product_attention = call
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain


class JointCalls:
    """Counts the joint-attention calls of a transformer (text encoders also use SDPA) by their length; gives (step,
    layer).
    """

    def __init__(self, layers: int, length: int) -> None:
        self.layers, self.length, self.count = layers, length, 0

    def next(self, query: Tensor) -> tuple[int, int] | None:
        """(forward, layer) of this call, None if it is not a joint one."""
        if query.shape[-2] != self.length:
            return None
        self.count += 1
        return divmod(self.count - 1, self.layers)
