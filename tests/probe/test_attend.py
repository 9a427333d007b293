import math

import pytest
import torch

from probe import attend
from tests.oracle import weights

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}


def tensors(rows=50, keys=40, dim=16, dtype=torch.float32, layout="bhnd"):
    g = torch.Generator().manual_seed(7)

    def make(n):
        x = torch.randn(2, n, 3, dim, generator=g, dtype=torch.float64).transpose(1, 2)
        return (x if layout == "bnhd" else x.contiguous()).to(dtype)

    return make(rows), make(keys), make(keys)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("layout", ["bhnd", "bnhd"])
def test_partial_agrees_with_the_matrix(dtype, layout):
    q, k, v = tensors(dtype=dtype, layout=layout)
    state = attend.partial(q, k, v)
    logits = q.double() @ k.double().mT / 4
    assert (state.lse.double() - logits.logsumexp(-1)).abs().max() < TOLERANCE[dtype]
    assert (state.out.double() - weights(q, k) @ v.double()).abs().max() < TOLERANCE[dtype]
    assert state.lse.is_contiguous()
    assert state.lse.dtype == attend.exact_dtype(dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_parts_merge_to_the_whole(dtype):
    q, k, v = tensors(dtype=dtype)
    cuts = [slice(0, 1), slice(1, 17), slice(17, 40)]
    parts = [attend.partial(q, k[..., c, :], v[..., c, :]) for c in cuts]
    merged = attend.merge(*parts)
    assert (merged.out.double() - weights(q, k) @ v.double()).abs().max() < TOLERANCE[dtype]
    masses = torch.stack([attend.mass(part, merged.lse) for part in parts])
    assert torch.allclose(masses.sum(0).double(), torch.ones(2, 3, 50, dtype=torch.float64), atol=TOLERANCE[dtype])
    expected = torch.stack([weights(q, k)[..., c].sum(-1) for c in cuts])
    assert (masses.double() - expected).abs().max() < TOLERANCE[dtype]


def test_merge_with_an_empty_set_is_the_identity():
    q, k, v = tensors()
    whole = attend.partial(q, k, v)
    empty = attend.partial(q, k[..., :0, :], v[..., :0, :])
    assert torch.isneginf(empty.lse).all()
    assert torch.equal(attend.merge(whole, empty).out, whole.out)
    nothing = attend.merge(empty, empty)
    assert torch.equal(nothing.out, torch.zeros_like(nothing.out))
    assert torch.isneginf(nothing.lse).all()


def test_no_rows_give_no_rows():
    q, k, v = tensors()
    assert attend.partial(q[..., :0, :], k, v).out.shape == (2, 3, 0, 16)


def test_last_dimension_may_be_strided():
    q, k, v = (x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in tensors())
    assert q.stride(-1) != 1
    assert (attend.partial(q, k, v).out.double() - weights(q, k) @ v.double()).abs().max() < 2e-6


def test_fully_hidden_rows_give_minus_infinity():
    q, k, v = tensors()
    bias = torch.zeros(1, 1, 50, 40)
    bias[..., 3, :] = -math.inf
    bias[..., 4, :39] = -math.inf
    state = attend.partial(q, k, v, bias=bias)
    assert torch.isneginf(state.lse[..., 3]).all()
    assert torch.equal(state.out[..., 3, :], torch.zeros(2, 3, 16))
    assert torch.allclose(state.out[..., 4, :], v[..., 39, :], atol=1e-6)
    assert torch.isfinite(state.lse[..., 4:]).all()


def test_bias_is_added_to_the_logits():
    q, k, v = tensors()
    bias = torch.randn(1, 1, 1, 40)
    logits = (q.double() @ k.double().mT / 4) + bias
    state = attend.partial(q, k, v, bias=bias)
    assert (state.out.double() - logits.softmax(-1) @ v.double()).abs().max() < 2e-6
    assert (state.lse.double() - logits.logsumexp(-1)).abs().max() < 2e-6


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_plain_with_lse_has_the_bits_of_the_model_kernel(dtype):
    q, k, v = tensors(50, 50, dtype=dtype, layout="bnhd")
    state = attend.plain(q, k, v)
    assert state is not None
    assert torch.equal(state.out, torch.nn.functional.scaled_dot_product_attention(q, k, v))


def test_probabilities_of_a_few_columns_are_exact_in_half_precision():
    q, k, v = tensors(dtype=torch.bfloat16)
    lse = attend.partial(q, k, v).lse
    p = attend.probabilities(q, k[..., 5:9, :], lse)
    assert p.dtype == torch.float32
    assert (p.double() - weights(q, k)[..., 5:9]).abs().max() < 2e-4


def test_a_wrong_kernel_is_refused(monkeypatch):
    real = attend._kernel

    def base_two(*arguments):
        state = real(*arguments)
        return attend.State(state.out, state.lse / math.log(2))

    monkeypatch.setattr(attend, "_kernel", base_two)
    attend.verify.cache_clear()
    with pytest.raises(attend.TapError, match="must agree with float64"):
        attend.verify("cpu", torch.float32)
    attend.verify.cache_clear()
