"""Sources of a Transfer in other calls of the step, and constants."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import control
import probe
from control.constant import Constant
from control.source import Peer
from probe.errors import PlanError, UsageError
from probe.region import video
from probe.site import Where, Which
from tests import tiny
from tests.control.whole import double_call, served
from tests.toys import Case
from tests.toys.bench import Keep, bench_of
from tests.toys.stock import followed

pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast")  # Mochi's own, on every CPU

BOTH = [tiny.PROMPT, tiny.OTHER]
ALIKE = [tiny.PROMPT, "a blue dog sits right"]  # as many tokens


@pytest.mark.parametrize("case", ["cogvideox", "wan", "mochi"])
def test_the_unconditional_half_takes_from_the_conditional_one(case):
    """In Wan it is a forward of its own, behind; in Mochi it comes first and cannot."""
    bench = bench_of(Case(case))
    other = Peer(lambda branch: replace(branch, guided=True), among=Which(guided=True))
    edit = control.Transfer(
        "kv", other, rows=video(), where=Where(branches=Which(guided=False), kinds={"self", "joint"})
    )
    if case == "mochi":
        with pytest.raises(PlanError, match="conditional prompt 0 .*at step 0 layer 0.*earlier calls gave: none"):
            bench.latents(edit)
        return
    latents, last = bench.latents(edit), {}

    def patched(call, run, q, k, v):
        if case == "wan" and call.nth:
            return run(q, k, v)
        if case == "wan" and call.conditional:
            last[call.layer] = k, v
            return run(q, k, v)
        if case == "wan":
            return run(q, *last[call.layer])
        k, v, at = k.clone(), v.clone(), tiny.TEXT
        k[0, :, at:], v[0, :, at:] = k[1, :, at:], v[1, :, at:]
        return run(q, k, v)

    with followed(bench.pipe, bench.turns, patched):
        assert torch.equal(latents, bench.latents())
    assert not torch.equal(latents, bench.plain)


def test_targets_in_later_turns_of_a_step_take_what_was_kept():
    """A loop that runs the source and its targets in forwards of their own; `keep` where a target is also beside it."""
    pipe = tiny.pipeline()
    source, one, two = (
        probe.Branch(role=role, copy=copy) for role, copy in (("source", 0), ("target", 0), ("target", 1))
    )
    text, latents = (
        torch.zeros(2, tiny.TEXT, 16),
        torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
    )

    def run(turns, **settings):
        peer = Peer(lambda branch: replace(branch, role="source", copy=0), among=Which(role="source"), **settings)
        keep = Keep(Where(layers=0))

        @torch.no_grad()
        def drive(clock):
            for step in (0, 1):
                for turn, branches in enumerate(turns):
                    clock.tell(step, 2, branches, turn)
                    n = len(branches)
                    pipe.transformer((turn + 1) * latents[:n], text[:n], torch.tensor([500 - step]).expand(n))

        edit = control.Transfer("k", peer, where=Where(branches=Which(role="target")))
        probe.trace(pipe, edit, keep).run(drive, [tiny.PROMPT])
        return keep.calls

    apart = run([[source], [one], [two]])
    beside = run([[source, one], [two]], keep=True)
    for calls in (apart, beside):
        per_step = len(calls) // 2
        for nth, call in enumerate(calls):
            first = calls[nth - nth % per_step]
            for k in call.k:
                assert torch.equal(k, first.own["k"][0])
            assert nth % per_step == 0 or not torch.equal(call.own["k"][0], call.k[0])
    with pytest.raises(PlanError, match="copy 1 at step 0 turn 1 layer 0.*earlier calls gave: none"):
        run([[source, one], [two]])


def test_a_source_must_come_before_its_target():
    bench = bench_of(Case("mochi"))
    with pytest.raises(PlanError, match="prompt 1 .*for unconditional prompt 0 .*at step 0 layer 0.*source first"):
        bench.latents(control.Transfer("kv", 1, 0), prompt=ALIKE)


@pytest.mark.parametrize("target", [1, None])
def test_sources_are_let_go_when_the_step_changes(target):
    """Mochi: k and v of the entry before its target, in each layer and half, until the next step."""
    bench, peer, held = bench_of(Case("mochi")), Peer(0), []

    class Watch(Keep):
        def serve(self, call, rows):
            super().serve(call, rows)
            held.append(peer.bytes)

    watch = Watch(Where(branches=Which(prompt=0)))
    bench.latents(control.Transfer("kv", peer, target), watch, prompt=ALIKE)
    sizes = [8 * call.k.numel() for call in watch.calls]
    assert len(sizes) == 12
    assert held == [sum(sizes[start : i + 1]) for start in (0, 6) for i in range(start, start + 6)]
    assert peer.bytes == 0


def test_what_is_only_a_source_keeps_its_bits():
    """Mochi: the second prompt gives to the third, and is no target of the first."""
    bench, three = bench_of(Case("mochi")), [*ALIKE, "the red dog runs left"]
    before = Peer(lambda branch: replace(branch, prompt=branch.prompt - 1), among=Which(prompt=1))
    latents = bench.latents(control.Transfer("kv", before, 2), prompt=three)
    plain = bench.latents(prompt=three)
    assert torch.equal(latents[:2], plain[:2])
    assert not torch.equal(latents[2], plain[2])


def test_transfers_may_share_a_source():
    bench, peer = bench_of(Case("mochi")), Peer(0)
    shared = control.Transfer("q", peer, 1), control.Transfer("kv", peer, 1, rows=video())
    apart = control.Transfer("q", 0, 1), control.Transfer("kv", 0, 1, rows=video())
    assert torch.equal(bench.latents(*shared, prompt=ALIKE), bench.latents(*apart, prompt=ALIKE))


def test_lockstep_sources_are_not_kept():
    pipe, peer, held = tiny.pipeline(), Peer(0), []

    class Watch(Keep):
        def serve(self, call, rows):
            held.append(peer.bytes)

    for edit in (control.Transfer("kv", peer, 1), control.Transfer("kv", peer)):
        tiny.latents(probe.trace(pipe, edit, Watch()), BOTH)
    assert set(held) == {0}


def test_constants_fill_the_rows():
    pipe = tiny.pipeline()

    def one_call(edit):
        keep = Keep(Where(steps=1, layers=1))
        tiny.latents(probe.trace(pipe, edit, keep), BOTH)
        return keep.calls[0]

    given = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    edits = {
        "mean": control.Transfer("q", Constant("mean"), 1, rows=video()),
        "zero": control.Transfer("q", Constant("zero"), 1, rows=video()),
        "given": control.Transfer("q", Constant(given), 1, rows=video()),
    }
    for name, edit in edits.items():
        call = one_call(edit)
        own, at = call.own["q"], tiny.TEXT
        filled = {"mean": own[3, :, at:].double().mean(1), "zero": torch.zeros(2, 16), "given": given}[name]
        assert (call.q[3, :, at:] - filled[:, None]).abs().max() < 1e-6
        assert torch.equal(call.q[3, :, :at], own[3, :, :at])
        assert torch.equal(call.q[2], own[2])
    with pytest.raises(UsageError, match=r"of shape \[16\]"):
        one_call(control.Transfer("q", Constant(torch.ones(5)), 1))


def test_a_mean_leaves_hidden_padding_out():
    """Of all rows, and of all columns, that may be seen."""
    for name in "qkv":
        call = double_call(order="video-text", visible=29)
        own = call.own[name][0].clone()
        served(call, control.Transfer(name, Constant("mean")))
        assert (getattr(call, name)[0, :, :29] - own[:, :29].mean(1, keepdim=True)).abs().max() < 1e-12
        assert (own.mean(1) - own[:, :29].mean(1)).abs().max() > 1e-3
