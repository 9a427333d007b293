"""Softmax maths: attention over part of the keys, and the exact merge of such parts.

A *state* over a key set S is `out_i = sum_S softmax_S(s_ij) v_j` and `lse_i = log sum_S exp(s_ij)`. States over
disjoint sets merge exactly, and `exp(lse_S - lse)` is the probability mass row i puts on S (FlashInfer's recursive
attention; ring attention). No N x N matrix is ever formed. Shapes: q [B, H, N, D], k and v [B, H, M, D]; lse [B, H,
N], natural log, float32 (float64 for float64).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from probe.errors import TapError

_ATEN = torch.ops.aten
_FLASH, _EFFICIENT, _CUDNN = 1, 2, 3  # torch.nn.attention.SDPBackend
_SAME_BITS: dict[tuple[object, ...], bool] = {}
_NAMES = {0: "math", _FLASH: "flash", _EFFICIENT: "efficient", _CUDNN: "cudnn"}


class State(NamedTuple):
    """Attention over one key set: out [B, H, N, D] and lse [B, H, N]."""

    out: Tensor
    lse: Tensor


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are kept in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def partial(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, bias: Tensor | None = None) -> State:
    """Fused attention of all rows of q over one key set.

    `bias` is added to the logits, float with four axes, each of size 1 or that of [B, H, N, M]. Empty key sets give
    out 0 and lse -inf; rows whose keys are all hidden by -inf likewise (the kernels themselves return 0 for their
    lse, or kill the process on empty inputs).
    """
    verify(q.device.type, q.dtype)
    return _partial(q, k, v, scale, bias)


def plain(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, mask: Tensor | None = None) -> State | None:
    """The model's own attention, bit for bit, with its lse; None when the kernel torch picks has no such form.

    `mask` is SDPA's own: bool (True = may be seen) or float. The first call of each shape is computed both ways and
    compared; later ones rely on that.
    """
    choice = torch._fused_sdp_choice(q, k, v, mask, 0.0, False, scale=scale)
    if choice not in (_FLASH, _EFFICIENT, _CUDNN) or min(q.shape[-2], k.shape[-2]) == 0:
        return None
    verify(q.device.type, q.dtype)
    masked = None if mask is None else (mask.dtype, mask.shape)
    kind = (q.device.type, q.dtype, choice, q.shape, k.shape, q.stride(), scale, masked)
    if _SAME_BITS.get(kind) is False:
        return None
    state = _kernel(choice, q, k, v, scale_of(q, scale), as_bias(mask, q.dtype))
    if kind not in _SAME_BITS:
        own = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        _SAME_BITS[kind] = torch.equal(state.out, own)
    return state if _SAME_BITS[kind] else None


def as_bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """SDPA's mask as numbers to add to the logits: 0 where a key may be seen, else -inf."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -math.inf)


def merge(*states: State) -> State:
    """Attention over the union of disjoint key sets, from attention over each."""
    acc = exact_dtype(states[0].out.dtype)
    lses = torch.stack([state.lse for state in states])
    total = torch.logsumexp(lses, 0)
    weights = torch.where(torch.isneginf(total), torch.zeros_like(lses), torch.exp(lses - total))
    out = torch.zeros_like(states[0].out, dtype=acc)
    for weight, state in zip(weights, states, strict=True):
        out.addcmul_(state.out.to(acc), weight.unsqueeze(-1).to(acc))
    return State(out.to(states[0].out.dtype), total)


def probabilities(q: Tensor, k: Tensor, lse: Tensor, scale: float | None = None) -> Tensor:
    """Exact attention weights of a few columns (or rows): exp(q k^T scale - lse), [B, H, N, M], in the dtype of lse.

    `lse` is over all keys of the softmax, of which k holds some. Half-precision scores are taken to float32 first:
    rounding them would cost 2e-2 of the weights.
    """
    acc = exact_dtype(q.dtype)
    batches = (x[None] if x.dim() == 2 else x.flatten(0, -3) for x in (q.to(acc), k.to(acc).mT, -lse.unsqueeze(-1)))
    rows, columns, shift = batches
    weights = torch.baddbmm(shift, rows, columns, alpha=scale_of(q, scale)).exp_()
    return weights.view(*q.shape[:-1], k.shape[-2])


def mass(state: State, total: Tensor) -> Tensor:
    """Probability each row puts on the key set of `state`, [B, H, N]; `total` is the lse over all keys."""
    return torch.exp(state.lse - total)


def scale_of(q: Tensor, scale: float | None) -> float:
    """The factor of the logits: 1 / sqrt(D) unless the model says otherwise."""
    return q.shape[-1] ** -0.5 if scale is None else scale


def _partial(q: Tensor, k: Tensor, v: Tensor, scale: float | None, bias: Tensor | None) -> State:
    if q.numel() == 0 or k.numel() == 0:  # process death in the CPU kernel
        lse = torch.full(q.shape[:-1], -math.inf, device=q.device, dtype=exact_dtype(q.dtype))
        return State(q.new_zeros((*q.shape[:-1], v.shape[-1])), lse)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))  # wrong numbers otherwise
    state = _kernel(_backend(q, k, v, bias), q, k, v, scale_of(q, scale), bias)
    return state if bias is None else _hide_masked(state, bias)


def _aligned(bias: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """[B, H, N, M] as CUDA kernels want it: expanded, with rows that start at multiples of 16 elements."""
    keys = k.shape[-2]
    padded = F.pad(bias.expand(*bias.shape[:-1], keys), (0, -keys % 16))[..., :keys]
    return padded.expand(*q.shape[:-1], keys)


def _hide_masked(state: State, bias: Tensor) -> State:
    hidden = torch.isneginf(bias).all(-1).expand(state.lse.shape)
    lse = state.lse.masked_fill(hidden, -math.inf)
    return State(state.out.masked_fill(hidden.unsqueeze(-1), 0.0), lse)


def _backend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> int:
    if q.device.type == "cpu":
        return _FLASH
    choice = torch._fused_sdp_choice(q, k, v, None if bias is None else bias.to(q.dtype), 0.0, False)
    if choice == 0:
        raise TapError(
            f"Attention with a log-sum-exp needs a fused kernel. Got {tuple(q.shape)} {q.dtype} on {q.device}, for "
            "which torch has none. Load the model in bfloat16 or float16."
        )
    return choice


def _kernel(choice: int, q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None) -> State:
    if q.device.type == "cpu":
        mask = None if bias is None else bias.to(exact_dtype(q.dtype))
        out, lse = _ATEN._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, attn_mask=mask, scale=scale)
        return State(out, lse.to(exact_dtype(q.dtype)).contiguous())  # comes back strided [B, N, H]
    mask = None if bias is None else _aligned(bias.to(q.dtype), q, k)
    if choice == _CUDNN:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        result = _ATEN._scaled_dot_product_cudnn_attention(q, k, v, mask, True, 0.0, False, False, scale=scale)
        lse = result[1].squeeze(-1) if result[1].dim() == 4 else result[1]
    elif choice == _FLASH:
        result = _ATEN._scaled_dot_product_flash_attention(q, k, v, 0.0, False, False, scale=scale)
        lse = result[1]
    else:
        result = _ATEN._scaled_dot_product_efficient_attention(q, k, v, mask, True, 0.0, False, scale=scale)
        lse = result[1][..., : q.shape[-2]]
    return State(result[0], lse.float())


def _probe(device: str, dtype: torch.dtype, rows: int = 130, keys: int = 77, dim: int = 64) -> Sequence[Tensor]:
    generator = torch.Generator().manual_seed(0)
    lengths = (rows, keys, keys)
    made = [torch.randn(1, n, 2, dim, generator=generator, dtype=torch.float64).transpose(1, 2) for n in lengths]
    return [x.to(device=device, dtype=dtype) for x in made]


@functools.cache
def verify(device: str, dtype: torch.dtype) -> dict[str, float]:
    """Compare the kernel with lse against float64 once per device and dtype; largest errors of out and lse.

    Catches base-2 logarithms, padded or transposed lse and wrong results on strided inputs.

    Raises:
        TapError: the kernel cannot be trusted.
    """
    q, k, v = _probe(device, dtype)
    logits = (q.double() @ k.double().mT) * q.shape[-1] ** -0.5
    state = _partial(q, k, v, None, None)
    errors = {
        "lse": (state.lse.double() - logits.logsumexp(-1)).abs().max().item(),
        "out": (state.out.double() - logits.softmax(-1) @ v.double()).abs().max().item(),
    }
    bound = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 2e-2)
    if state.lse.shape != q.shape[:-1] or not max(errors.values()) < bound:
        raise TapError(
            f"The attention kernel must agree with float64 to {bound:g}. Got errors {errors} on {device} in {dtype}. "
            "Choose another dtype, or report this torch version."
        )
    return errors


def backend_name(device: str, dtype: torch.dtype) -> str:
    """The kernel torch picks for plain attention here, for provenance: flash, efficient, cudnn or math."""
    q, k, v = _probe(device, dtype)
    return _NAMES.get(torch._fused_sdp_choice(q, k, v), "unknown")
