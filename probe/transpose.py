"""The attention matrix summed over rows: queries and keys swapped. No N x N matrix is formed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from probe import attend


def column_sums(q: Tensor, k: Tensor, lse: Tensor, scale: float, channels: bool | None = None) -> Tensor:
    """sum_i p_ij of every column j over the rows given, [H, M]; q [H, R, D], k [H, M, D], lse [H, R] over all keys.

    The swapped call: keys look at queries, and -lse_i is added to every logit of row i, so that the log-normaliser of
    column j is log sum_i exp(s_ij - lse_i). The CPU kernel takes -lse as a float32 bias. CUDA kernels want a bias in
    the dtype of q, which in bfloat16 is 2e-2 wrong; there -lse goes into extra head channels (`channels`), as three
    numbers of that dtype that sum to it. Weights of rows would be one more bias, log w_i.

    Relative error 1e-5 in float32; in half precision 1e-4, that of the float32 sums inside the kernels. No rows give 0.
    """
    if q.device.type != "cpu" if channels is None else channels:
        q, k = _with_bias_channels(q, k, lse.neg() / scale)
        state = attend.partial(k[None], q[None], q[None], scale)
    else:
        state = attend.partial(k[None], q[None], q[None], scale, bias=lse.neg()[None, :, None])
    return state.lse[0].exp()


def _with_bias_channels(q: Tensor, k: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """q and k with channels that add `bias` [H, R] to q_i k_j; the width is a multiple of 8, as fused kernels need."""
    parts, rest = [], bias
    for _ in range(3):
        parts.append(rest.to(q.dtype))
        rest = rest - parts[-1].to(rest.dtype)
    pad = -(q.shape[-1] + len(parts)) % 8
    q = F.pad(torch.cat([q, torch.stack(parts, -1)], -1), (0, pad))
    return q, F.pad(F.pad(k, (0, len(parts)), value=1.0), (0, pad))
