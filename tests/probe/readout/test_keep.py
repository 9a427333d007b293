"""Kept Q and K: the tensors of the chosen calls, and of no others."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

import probe
from probe.readout.feature import Features
from probe.readout.keep import KeepQK
from tests import tiny
from tests.oracle import weights
from tests.probe.readout.calls import matrix, one_call


def kept(call, *arguments, **options):
    keep = KeepQK([(0, 0)], *arguments, **options)
    keep.serve(call, (0,))
    (value,) = keep.values.values()
    return value


def map_of(value):
    return weights(*(torch.from_numpy(value[name]) for name in "qk")).numpy()


@pytest.mark.parametrize("kind", ["joint", "self", "cross"])
def test_kept_q_and_k_are_those_of_the_call(kind):
    call = one_call(kind=kind)
    value = kept(call, np.float32)
    for name in "qk":
        assert value[name].dtype == np.float32
        np.testing.assert_array_equal(value[name], getattr(call, name)[0].numpy())
    np.testing.assert_allclose(map_of(value), matrix(call), atol=1e-12)


def test_half_precision_keeps_the_bits_of_bfloat16():
    call = one_call(torch.bfloat16)
    value = kept(call)
    for name in "qk":
        assert value[name].dtype == np.float16
        np.testing.assert_array_equal(value[name].astype(np.float32), getattr(call, name)[0].float().numpy())
    rounded = kept(one_call(torch.float32))["k"].astype(np.float32)
    exact = one_call(torch.float32).k[0].numpy()
    assert 1e-4 < (np.abs(rounded - exact) / np.abs(exact)).max() < 5e-4


def test_hidden_keys_are_left_out():
    call = one_call(order="video-text", visible=28)
    value = kept(call, np.float32)
    assert value["q"].shape == value["k"].shape == (2, 28, 16)
    np.testing.assert_allclose(map_of(value), matrix(call), atol=1e-12)


def test_kept_q_carries_the_scale_of_the_model():
    call = replace(one_call(), scale=0.7)
    np.testing.assert_allclose(map_of(kept(call, np.float32)), matrix(call), atol=1e-6)


def test_heads_can_be_chosen():
    call = one_call()
    value = kept(call, where=probe.Where(heads=1))
    np.testing.assert_array_equal(value["k"][0], call.k[0, 1].numpy().astype(np.float16))
    assert len(value["q"]) == 1


def test_only_the_chosen_pairs_are_kept():
    """Steps and layers of the pairs are not crossed, and no bit of the video changes."""
    pipe, keep = tiny.pipeline(), KeepQK([(0, 2), (1, 0), (1, 0)])
    seen = tiny.latents(probe.trace(pipe, keep), steps=2)
    assert torch.equal(seen, tiny.latents(pipe, steps=2))
    assert [(at.step, at.layer) for at in keep.values] == [(0, 2), (1, 0)]
    assert {at.branch.guided for at in keep.values} == {True}
    assert keep.cost(probe.TokenLayout("text-video", 12, probe.Grid(3, 4, 4))) == 0


@pytest.mark.parametrize("stage", [probe.Stage.BEFORE, probe.Stage.USED])
@pytest.mark.parametrize("make", [partial(KeepQK, [(0, 0)]), partial(Features, "k")], ids=["qk", "features"])
def test_keeping_takes_no_attention(monkeypatch, make, stage):
    extra = []
    monkeypatch.setattr("probe.call.attend.partial", lambda *a, **k: extra.append(a))
    monkeypatch.setattr("probe.call.attend.plain", lambda *a, **k: extra.append(a))
    tiny.latents(probe.trace(tiny.pipeline(), make(stage=stage)), steps=1)
    assert not extra


@pytest.mark.parametrize(("sites", "said"), [((), "none"), (((0, 0), (2, 1), (0, 3)), r"\[\(2, 1\), \(0, 3\)\]")])
def test_sites_outside_the_run_are_refused(sites, said):
    with pytest.raises(probe.MmditError, match=f"of steps 0 to 1 and layers 0 to 2. Got {said}. Name pairs"):
        tiny.latents(probe.trace(tiny.pipeline(), KeepQK(sites)), steps=2)


def test_numbers_that_do_not_fit_are_refused():
    call = one_call()
    call.rebind(k=call.k * 1e5)
    with pytest.raises(probe.MmditError, match="must fit float16; float16 ends at 65504. Got .*e.05 at step 0 layer 0"):
        kept(call)
    assert np.abs(kept(call, np.float32)["k"]).max() > 65504
    with pytest.raises(probe.MmditError, match="must be float16 or float32. Got int8"):
        KeepQK([(0, 0)], np.int8)
