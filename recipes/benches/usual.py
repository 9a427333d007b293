"""The usual forms of rewritings, with a whole N x N mask or the whole weights: what `mmdit bench rewrite` compares
with, and in float64 what it measures errors against. q, k, v [2, H, N, D]; "the other" is the other entry of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Dense = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q, k, v -> the output [2, H, N, D], in their dtype."""


def hide(hidden: Tensor) -> Tensor:
    """-inf where hidden, else 0."""
    return torch.where(hidden, -math.inf, 0.0)


def additive(bias: Callable[[], Tensor]) -> Dense:
    """A bias [N, N] on the logits."""

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias().to(q.device, q.dtype).contiguous()[None, None])

    return dense


def swapped(**which: bool) -> Dense:
    """Some of q, k, v from the other."""

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tensors = {"q": q, "k": k, "v": v}
        q, k, v = (tensor.flip(0) if which.get(name) else tensor for name, tensor in tensors.items())
        return F.scaled_dot_product_attention(q, k, v)

    return dense


def matrix(q: Tensor, k: Tensor) -> Tensor:
    """The attention matrix [2, H, N, N]."""
    return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1)


def soft_identity(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A quarter of each row looks at its own key alone."""
    weights = 0.75 * matrix(q, k)
    weights.diagonal(dim1=-2, dim2=-1).add_(0.25)
    return weights @ v


def mean_of_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every row looks at all keys alike."""
    return v.mean(2, keepdim=True).expand_as(v)


def own_key(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The odds of a row's own key times 3."""
    weights = matrix(q, k)
    weights.diagonal(dim1=-2, dim2=-1).mul_(3)
    return weights / weights.sum(-1, keepdim=True) @ v


def null_key(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A logit of 5 whatever the row looks for: a key of zeros, raised by 5."""
    none = k.new_zeros(*k.shape[:2], 1, k.shape[-1])
    raised = torch.zeros(k.shape[2] + 1, dtype=q.dtype, device=q.device)
    raised[-1] = 5
    return F.scaled_dot_product_attention(q, torch.cat([k, none], 2), torch.cat([v, none], 2), attn_mask=raised[None])


def own_mass(text: Tensor) -> Dense:
    """Video rows keep the share they give to the video, and take from the source how it is spread."""

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        first, own = int(text.sum()), matrix(q, k)
        rows = own[:, :, first:]
        theirs = matrix(q.flip(0)[:, :, first:], k.flip(0)[:, :, first:])
        rows[..., first:] = rows[..., first:].sum(-1, keepdim=True) * theirs
        return own @ v

    return dense


def raw_columns(columns: Tensor, factor: float) -> Dense:
    """Weights of some columns times a factor, rows no longer of sum 1."""

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (matrix(q, k) * torch.where(columns.to(q.device), factor, 1.0).to(q.dtype)) @ v

    return dense


def concatenated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One softmax over the own keys and the other's."""
    return F.scaled_dot_product_attention(q, torch.cat([k, k.flip(0)], 2), torch.cat([v, v.flip(0)], 2))


def blended(weight: Tensor) -> Dense:
    """Own attention and attention to the other, mixed by a weight per row."""

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        own, theirs = F.scaled_dot_product_attention(q, k, v), F.scaled_dot_product_attention(q, k.flip(0), v.flip(0))
        return own.lerp(theirs, weight.to(q.device, q.dtype)[:, None])

    return dense


def two_passes(mask: Tensor, text: int) -> Dense:
    """All rows attend twice, once with the outside of the source hidden and once with its inside, and the outputs are
    put together by the target's mask (the authors' form); the `text` first rows see all.
    """

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = k.flip(0), v.flip(0)
        sees = [hide(side).to(q.device, q.dtype)[None, None, None] for side in (_outside(mask, text), mask)]
        ways = [F.scaled_dot_product_attention(q, k, v, attn_mask=seen.expand(1, 1, len(mask), -1)) for seen in sees]
        out = torch.where(mask.to(q.device)[:, None], *ways)
        out[:, :, :text] = F.scaled_dot_product_attention(q[:, :, :text], k, v)
        return out

    return dense


def _outside(mask: Tensor, text: int) -> Tensor:
    outside = ~mask
    outside[:text] = False
    return outside
