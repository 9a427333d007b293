"""One partition may serve the output and the readouts, and readouts of one call share work."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import probe
from probe import attend
from probe.readout.entropy import Entropy
from probe.readout.frame import FrameMass
from probe.readout.token import TokenMass
from tests import tiny
from tests.probe.readout import calls

PARTS = [8, 8, 8, 7]
MASSES = {"frames": FrameMass, "regions": probe.RegionMass, "tokens": TokenMass, "words": lambda: probe.WordMaps("cat")}


@pytest.fixture
def partials(monkeypatch):
    """The key counts of every attention over part of the keys."""
    real, seen = attend.partial, []
    monkeypatch.setattr(attend, "partial", lambda q, k, *rest: seen.append(k.shape[-2]) or real(q, k, *rest))
    return seen


def run(*readouts, fuse=False, **model):
    return tiny.latents(probe.trace(tiny.pipeline(**model), *readouts, fuse=fuse), steps=2)


def test_fuse_is_off_by_default_and_then_bit_identical():
    assert torch.equal(run(FrameMass(), probe.RegionMass()), tiny.latents(tiny.pipeline(), steps=2))


@pytest.mark.parametrize("rotary", [False, True])
def test_fuse_changes_the_output_by_rounding_only(rotary):
    plain, fused = run(rotary=rotary), run(FrameMass(), fuse=True, rotary=rotary)
    assert 0 < (fused - plain).abs().max() <= 5e-7 * plain.abs().max()


def test_fused_masses_equal_those_of_their_own():
    apart, together = ({name: make() for name, make in MASSES.items()} for _ in range(2))
    run(*apart.values())
    run(*together.values(), fuse=True)
    for name in ("frames", "regions"):
        assert len(together[name].values) == 6
        for at, table in together[name].values.items():
            assert np.abs(table - apart[name].values[at]).max() < 2e-6


def test_without_a_readout_in_parts_fuse_changes_nothing():
    assert torch.equal(run(TokenMass(), Entropy(), fuse=True), tiny.latents(tiny.pipeline(), steps=2))


def test_a_fused_call_is_computed_once_in_parts(partials):
    run(FrameMass(), fuse=True)
    assert partials == [16, 16, 16, 12] * 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_call_in_parts_gives_the_plain_output(dtype):
    call = calls.one_call(dtype)
    call.run_in_parts()
    plain = attend.partial(call.q, call.k, call.v)
    assert call.out is not None
    assert (call.out - plain.out).abs().max() < {torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
    assert (call.lse() - plain.lse).abs().max() < 1e-4
    fused, apart = (calls.value_of(FrameMass(), one) for one in (call, calls.one_call(dtype)))
    assert np.abs(fused - apart).max() < 5e-5


def test_a_call_of_one_part_falls_back_to_plain():
    call = calls.one_call(kind="self", grid=probe.Grid(1, 2, 4))
    call.run_in_parts()
    assert call.out is None
    assert np.allclose(calls.value_of(FrameMass(), call).sum(-1), 1, atol=1e-6)


def two_entries(visible):
    """A masked call of two batch entries that may see the first `visible` keys each."""
    one = calls.one_call(torch.float64, order="video-text", visible=29)
    q, k, v = (torch.cat([tensor, tensor.flip(-1)]) for tensor in (one.q, one.k, one.v))
    mask = torch.arange(k.shape[-2]) < torch.tensor(visible)[:, None, None, None]
    return replace(one, q=q, k=k, v=v, branches=one.branches * 2, mask=mask, visible=visible)


def test_a_masked_call_whose_entries_see_the_same_keys_is_fused():
    call = two_entries((29, 29))
    call.run_in_parts()
    plain = torch.nn.functional.scaled_dot_product_attention(call.q, call.k, call.v, attn_mask=call.mask)
    assert call.out is not None
    assert (call.out - plain).abs().max() < 1e-12
    for row in (0, 1):
        apart = FrameMass().reduce(two_entries((29, 29)).entry(row))
        assert (FrameMass().reduce(call.entry(row)) - apart).abs().max() < 1e-12


def test_a_masked_call_whose_entries_see_different_keys_falls_back_to_plain():
    call = two_entries((29, 27))
    call.run_in_parts()
    assert call.out is None


def test_heads_are_taken_some_at_a_time(monkeypatch, partials):
    whole, chunked = calls.one_call(), calls.one_call()
    whole.run_in_parts()
    before = len(partials)
    monkeypatch.setattr("probe.call._PART_BYTES", 1)
    chunked.run_in_parts()
    assert len(partials) - before == 2 * before
    assert torch.equal(whole.out, chunked.out)
    assert torch.equal(whole.entry(0).shares, chunked.entry(0).shares)


@pytest.mark.parametrize("order", [list(MASSES), list(MASSES)[::-1]], ids=str)
def test_readouts_of_one_call_share_their_parts(partials, order):
    def count(*readouts):
        partials.clear()
        run(*readouts)
        return len(partials) / 6

    apart = {name: count(make()) for name, make in MASSES.items()}
    assert apart == {"frames": 1, "regions": 1, "tokens": 0, "words": 0}
    assert count(*(MASSES[name]() for name in order)) == 1  # the frames', which serve the regions too


@pytest.mark.parametrize(("dtype", "parts"), [(torch.float64, [31]), (torch.float32, [31]), (torch.bfloat16, PARTS)])
def test_half_precision_measures_frames_in_parts(partials, dtype, parts):
    """One-hot values take one attention, whose output half precision would round."""
    call = calls.one_call(dtype)
    call.run_with_lse()
    calls.value_of(FrameMass(), call)
    assert partials == parts


@pytest.mark.parametrize(("dtype", "parts"), [(torch.float32, [31, 31]), (torch.bfloat16, [31, *PARTS])])
def test_a_fused_call_gives_its_parts_to_entries_that_were_there_before(partials, dtype, parts):
    """A readout of the model's own tensors comes first, and knows no parts."""
    call = calls.one_call(dtype)
    before = calls.value_of(FrameMass(stage=probe.Stage.BEFORE), call)
    assert partials == parts
    call.run_in_parts()
    assert partials == [*parts, *PARTS]
    regions = calls.value_of(probe.RegionMass(), call)
    again = calls.value_of(FrameMass(), call)
    assert partials == [*parts, *PARTS]  # nothing of its own: text and padding are thin products
    assert np.abs(again - before).max() < 5e-5
    assert np.abs(regions[:, 2, 2:].sum(-1) - again[..., :3].sum(-1).mean(1)).max() < 5e-5


def test_an_entry_knows_the_log_normaliser_that_came_after_it(partials):
    call = calls.one_call()
    entry = call.entry(0)
    assert partials == []
    call.run_with_lse()
    assert call.entry(0) is entry
    assert torch.equal(entry.lse, call.lse()[0])
    assert partials == []


def test_the_entropy_within_the_video_needs_no_log_normaliser_of_its_own(partials):
    readout, call = Entropy(video_conditional=True), calls.one_call()
    call.lse()
    partials.clear()
    calls.value_of(readout, call)
    assert partials == [24, 24]
