"""DiTCtrl's attention as its authors compute it, for comparison: whole maps and dense masks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from recipes.benches.attention import Shape


@contextmanager
def pair_attention(layers: range, columns: Sequence[int] | None, shape: Shape) -> Iterator[None]:
    """Attention as the authors' classes do it: in some layers the second and fourth entry read keys and values of the
    first and third. With the text columns of an object also their mask-guided form: the maps of every layer written
    out, and two attentions with dense masks.
    """
    plain, calls, total = F.scaled_dot_product_attention, count(), torch.zeros(())

    def attend(q: Tensor, k: Tensor, v: Tensor, **rest: Any) -> Tensor:
        nonlocal total
        layer = next(calls)
        if columns is not None:
            total = total.to(q.device) + _mean_map(q, k)
        if layer not in layers:
            return plain(q, k, v, **rest)
        if columns is None:
            lent = [0, 0, 2, 2]
            return plain(q, k[lent], v[lent], **rest)
        rows = [plain(q[i : i + 1], k[i : i + 1], v[i : i + 1]) for i in (0, 2)]
        source, target = (_inside(total[i], columns, shape) for i in (2, 3))
        gate = torch.cat([target.new_zeros(shape.text), target]).to(q.dtype).view(1, 1, -1, 1)
        made = []
        for i in (0, 2):
            seen, rest_seen = (_dense(inside, shape, q) for inside in (source, ~source))
            front, back = (
                plain(q[i + 1 : i + 2], k[i : i + 1], v[i : i + 1], attn_mask=bias) for bias in (seen, rest_seen)
            )
            made.append(gate * front + (1 - gate) * back)
        return torch.cat([rows[0], made[0], rows[1], made[1]])

    F.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain


def _mean_map(q: Tensor, k: Tensor) -> Tensor:
    """Mean over heads of the whole matrix, [B, N, N], head by head."""
    total = q.new_zeros(len(q), q.shape[2], q.shape[2])
    for head in range(q.shape[1]):
        total += (q[:, head] @ k[:, head].mT / q.shape[-1] ** 0.5).softmax(-1)
    return total / q.shape[1]


def _inside(matrix: Tensor, columns: Sequence[int], shape: Shape) -> Tensor:
    column = matrix[shape.text :, list(columns)].sum(1).view(shape.grid.frames, -1)
    low, high = column.amin(1, keepdim=True), column.amax(1, keepdim=True)
    return ((column - low) / (high - low + 1e-6) >= 0.3).flatten()


def _dense(inside: Tensor, shape: Shape, like: Tensor) -> Tensor:
    """The authors' additive mask [N, N]: video rows do not see video columns outside."""
    size = shape.text + shape.grid.size
    bias = like.new_zeros(size, size)
    bias[shape.text :, shape.text :].masked_fill_(~inside, torch.finfo(like.dtype).min)
    return bias
