"""The error bounds that the docstrings state for half precision, on sharp attention with an offset in the keys."""

import numpy as np
import pytest
import torch

from probe import attend
from probe.layout import Grid
from probe.readout.entropy import Entropy, entropy_of, participation_of
from probe.readout.frame import FrameMass
from probe.readout.mass import RegionMass
from probe.readout.token import TokenMass
from tests.probe.readout import calls

TEXT, GRID = 32, Grid(4, 8, 16)
HALF = [torch.bfloat16, torch.float16]
ENTROPY = {torch.bfloat16: 8e-2, torch.float16: 1e-2}


def big_call(dtype, sharp, offset):
    """544 tokens, heads of 64; `offset` moves every key by one vector of that deviation, as trained models do."""
    call = calls.one_call(dtype, text=TEXT, grid=GRID, dim=64, pads=20, sharp=sharp)
    shift = offset * torch.randn(2, 1, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    call.rebind(k=(call.k.double() + shift).to(dtype), q=(call.q.double() + shift / 2).to(dtype))
    return call


@pytest.fixture(scope="module", params=[(2.0, 0.0), (4.0, 0.0), (2.0, 4.0)], ids=["sd 2", "sd 4", "keys offset"])
def pairs(request):
    """Each half-precision call with its matrix."""
    made = {dtype: big_call(dtype, *request.param) for dtype in HALF}
    return {dtype: (call, calls.matrix(call)) for dtype, call in made.items()}


@pytest.mark.parametrize("dtype", HALF)
def test_masses_of_parts_keep_float32(pairs, dtype):
    call, p = pairs[dtype]
    entry = call.entry(0)
    shares = np.stack([p[:, :, part].sum(-1) for part in entry.columns.parts()], -1)
    assert np.abs(entry.shares.numpy() - shares).max() < 1e-4
    frames = shares[:, TEXT:].reshape(2, 4, 128, 5).mean(2)
    assert np.abs(calls.value_of(FrameMass(), call) - frames).max() < 5e-5
    regions = calls.value_of(RegionMass(), call)
    assert np.abs(regions[:, 2, :2].sum(-1) - frames[:, :, 4].mean(1)).max() < 1e-4


@pytest.mark.parametrize("dtype", HALF)
def test_the_thin_product_is_taken_in_float32(pairs, dtype):
    call, p = pairs[dtype]
    entry = call.entry(0)
    thin = entry.weights(columns=entry.columns.text_slice)
    assert thin.dtype == torch.float32
    assert np.abs(thin.numpy() - p[:, :, :TEXT]).max() < 2e-4
    expected = p[:, TEXT:, :TEXT].mean(1)
    assert (np.abs(calls.value_of(TokenMass(), call)["video"] - expected) / expected).max() < 1e-4
    rounded = (entry.q @ entry.k[:, :TEXT].mT).float() * entry.scale - entry.lse[..., None]
    assert np.abs(rounded.exp().numpy() - p[:, :, :TEXT]).max() > 1e-3  # what rounding the scores would cost


@pytest.mark.parametrize("dtype", HALF)
def test_entropy_and_participation_keep_their_bounds(pairs, dtype):
    call, p = pairs[dtype]
    entry, entropy = call.entry(0), -(p * np.log(p)).sum(-1)
    error = entropy_of(entry).numpy() - entropy
    assert np.abs(error).max() < ENTROPY[dtype]
    assert np.abs(error[:, TEXT:].mean(1)).max() < ENTROPY[dtype] / 10
    assert np.abs(calls.value_of(Entropy(), call)["entropy"][:, 2, 0] - entropy[:, TEXT:].mean(1)).max() < 8e-3
    squares = (p * p).sum(-1)
    assert np.abs(participation_of(entry).numpy() * squares - 1).max() < 3e-4


@pytest.mark.parametrize("dtype", HALF)
def test_an_offset_of_all_keys_stays_out_of_the_rounding(dtype):
    """It moves no probability: with K itself in place of V it would cost more than all the rest."""
    call = big_call(dtype, 2.0, 8.0)
    entry, p = call.entry(0), calls.matrix(call)
    entropy = -(p * np.log(np.maximum(p, 1e-300))).sum(-1)
    naive = attend.partial(call.q, call.k, call.k).out[0].float()
    naive = entry.lse - (entry.q.float() * naive).sum(-1) * entry.scale
    assert np.abs(entropy_of(entry).numpy() - entropy).max() < ENTROPY[dtype]
    assert np.abs(naive.numpy() - entropy).max() > 2 * ENTROPY[dtype]
