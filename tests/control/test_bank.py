"""Banks: later steps and later runs take what was kept, bit for bit."""

from __future__ import annotations

import pytest
import torch

import control
import probe
from control.bank import Bank
from control.source import Stored
from probe.errors import PlanError, UsageError
from probe.region import video
from probe.site import Branch, Where, Which
from tests import tiny
from tests.oracle import JointCalls, patched_attention
from tests.toys import Case
from tests.toys.bench import Keep, bench_of

pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast")  # Mochi's own, on every CPU

TOKENS = tiny.TEXT + 48
LATE = Where(steps=slice(1, 3), layers={0, 2})


@pytest.fixture(scope="module")
def pipe():
    return tiny.pipeline(rotary=True)


@pytest.fixture(scope="module")
def plain(pipe):
    return tiny.latents(pipe, tiny.OTHER)


def traced(pipe, *handlers, prompt=tiny.OTHER):
    return tiny.latents(probe.trace(pipe, *handlers), prompt)


def banked(pipe, tensors="v", where=LATE, **settings):
    """What a run of the first prompt leaves."""
    bank = Bank(tensors, where, **settings)
    assert torch.equal(traced(pipe, bank, prompt=tiny.PROMPT), tiny.latents(pipe, tiny.PROMPT))
    return bank


@pytest.mark.parametrize("tensors", ["v", "qk", "o"])
def test_a_second_run_takes_what_the_first_one_had(pipe, plain, tensors):
    bank = banked(pipe, tensors)
    edited = traced(pipe, control.Transfer(tensors, Stored(bank), where=LATE))
    calls, first = JointCalls(3, TOKENS), {}

    def noting(own, q, k, v, **rest):
        at, out = calls.next(q), own(q, k, v, **rest)
        first[at] = {"q": q, "k": k, "v": v, "o": out}
        return out

    def replayed(own, q, k, v, **rest):
        at, here = calls.next(q), {"q": q, "k": k, "v": v}
        if at is None or at[0] not in (1, 2) or at[1] not in (0, 2):
            return own(q, k, v, **rest)
        if tensors == "o":
            return first[at]["o"]
        q, k, v = (first[at][name] if name in tensors else here[name] for name in "qkv")
        return own(q, k, v, **rest)

    with patched_attention(noting):
        tiny.latents(pipe, tiny.PROMPT)
    calls.count = 0
    with patched_attention(replayed):
        assert torch.equal(edited, tiny.latents(pipe, tiny.OTHER))
    assert not torch.equal(edited, plain)
    assert torch.equal(edited, traced(pipe, control.Transfer(tensors, Stored(bank), where=LATE)))


def test_a_run_empties_its_bank_unless_it_is_frozen(pipe):
    bank = banked(pipe)
    assert len(bank) == 2 * 2 * 2
    before = bank.find(1, 0, "joint", Branch()).tensors["v"]
    bank.frozen = True
    traced(pipe, bank)
    assert bank.find(1, 0, "joint", Branch()).tensors["v"] is before
    bank.frozen = False
    traced(pipe, bank)
    assert len(bank) == 8
    assert not torch.equal(bank.find(1, 0, "joint", Branch()).tensors["v"], before)


@pytest.mark.parametrize("case", ["sd3", "mochi", "wan"])
def test_a_head_keeps_the_map_of_a_step(case):
    """Head freeze: q and k of the pivot step, in both halves, while other heads go on."""
    bench, keep = bench_of(Case(case)), Keep()
    bank = Bank("qk", Where(steps=0))
    late = Where(steps=slice(1, None), heads=1)
    latents = bench.latents(bank, control.Transfer("qk", Stored(bank, step=0), where=late), keep, steps=3)
    assert not torch.equal(latents, bench.latents(steps=3))
    pivot = {
        (call.site.layer, call.site.kind, branch): (call.q[row], call.k[row])
        for call in keep.calls
        for row, branch in enumerate(call.branches)
        if call.site.step == 0
    }
    for call in keep.calls:
        for row, branch in enumerate(call.branches):
            q, k = pivot[call.site.layer, call.site.kind, branch]
            assert torch.equal(call.q[row, 1], q[1])
            assert torch.equal(call.k[row, 1], k[1])
            assert torch.equal(call.k[row, 0], call.own["k"][row, 0])


def test_a_stored_source_may_name_step_layer_and_branch(pipe):
    bank, keep = (
        banked(pipe, "k", Where(steps=3, layers=2, branches=Which(guided=True))),
        Keep(Where(steps=0, layers=1)),
    )
    source = Stored(
        bank, step=lambda step: step + 3, layer=2, branch=lambda branch: Branch() if branch.guided else None
    )
    traced(pipe, control.Transfer("k", source, rows=video(), where=Where(steps=0, layers=1)), keep)
    (call,), kept = keep.calls, bank.find(3, 2, "joint", Branch()).tensors["k"]
    assert torch.equal(call.k[1, :, tiny.TEXT :], kept[:, tiny.TEXT :])
    assert torch.equal(call.k[0], call.own["k"][0])


def test_the_memory_is_its_own_and_predicted(pipe):
    bank = banked(pipe, "kv", Where(steps={0, 3}, layers=1, heads=1), device="cpu")
    layout = probe.TokenLayout("text-video", tiny.TEXT, probe.Grid(3, 4, 4))
    assert bank.bytes == bank.predicted_bytes(layout, 4, 3, heads=2, width=16, branches=2, itemsize=4)
    assert bank.bytes == 2 * 2 * 2 * TOKENS * 16 * 4
    one = bank.find(0, 1, "joint", Branch()).tensors["k"]
    assert one.untyped_storage().nbytes() == one.numel() * 4
    bank.clear()
    assert bank.bytes == len(bank) == 0


def test_each_turn_of_a_step_is_kept(pipe):
    bank, seen = Bank("k"), []
    keep = Keep(Where(layers=0))

    @torch.no_grad()
    def drive(clock):
        for turn in (0, 1):
            clock.tell(0, 1, [Branch()], turn)
            seen.append(turn)
            text, latents = torch.zeros(1, tiny.TEXT, 16), torch.randn(1, 3, 4, 8, 8)
            rotary = pipe._prepare_rotary_positional_embeddings(32, 32, 3, "cpu")
            pipe.transformer(latents, text, torch.tensor([500]), image_rotary_emb=rotary)

    probe.trace(pipe, bank, keep).run(drive, [tiny.PROMPT])
    for turn, call in enumerate(keep.calls):
        assert torch.equal(bank.find(0, 0, "joint", Branch(), turn).tensors["k"], call.k[0])
    assert bank.find(0, 0, "joint", Branch(), 5) is bank.find(0, 0, "joint", Branch(), 1)


def test_banks_refuse(pipe):
    with pytest.raises(UsageError, match="A Bank must name tensors among q, k, v, o. Got 'kw'"):
        Bank("kw")
    bank = banked(pipe, "k", Where(steps=0, layers=0, heads=0))
    with pytest.raises(
        PlanError, match="unconditional prompt 0 .*at step 1 layer 0, which takes from .*step 1 layer 0"
    ):
        traced(pipe, control.Transfer("k", Stored(bank), where=Where(steps=1, heads=0)))
    with pytest.raises(PlanError, match=r"v of heads \(0,\) asked of .*which has k of heads \(0,\)"):
        traced(pipe, control.Transfer("kv", Stored(bank, step=0, layer=0), where=Where(heads=0)))
    with pytest.raises(PlanError, match=r"k of heads \(0, 1\)"):
        traced(pipe, control.Transfer("k", Stored(bank, step=0, layer=0)))


def test_another_size_is_refused(pipe):
    bank, small = banked(pipe, "v", Where(steps=0)), {"height": 16, "width": 32}
    with pytest.raises(PlanError, match="the grid of its target. Got 3x4x4 for 3x2x4"):
        tiny.latents(probe.trace(pipe, control.Transfer("v", Stored(bank), where=Where(steps=0))), tiny.OTHER, **small)
