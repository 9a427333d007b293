"""Guidance by perturbed passes, against the formula on predictions made one by one in float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

import probe
from control.adapter import Loop
from control.denoise import Lockstep, State, denoise
from control.edit import Edit
from control.guide import Guide
from control.strength import Ramp
from probe.errors import UsageError
from probe.site import Progress, Where, Which
from tests import tiny
from tests.oracle import patched_attention

STEPS, SCALE = 4, 3.0
PROMPTS = [tiny.PROMPT, tiny.OTHER]
JOINT = tiny.TEXT + 3 * 4 * 4


@dataclass(eq=False, kw_only=True)
class Flat(Edit):
    """Values replaced by their mean: uniform attention, whatever the maps."""

    touches = frozenset({"v"})
    rank = 2

    def apply(self, call, entry, amount):
        v = call.writable("v")
        v[entry] = v[entry].mean(-2, keepdim=True)


@dataclass(eq=False, kw_only=True)
class Loud(Edit):
    """Values twice as large."""

    touches = frozenset({"v"})
    rank = 2

    def apply(self, call, entry, amount):
        call.writable("v")[entry] *= 2


PATCHES = {
    "plain": lambda v: v,
    "perturbed": lambda v: v.mean(-2, keepdim=True).expand_as(v),
    "loud": lambda v: 2 * v,
}


@pytest.fixture(scope="module")
def pipe():
    return tiny.pipeline(rotary=True, dtype=torch.float64)


@pytest.fixture
def latents():
    return torch.randn(2, 3, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def at(role):
    return Where(branches=Which(role=role))


def predicted(pipe, latents, step, *guides, guidance=SCALE, handlers=()):
    """Our prediction of a step, and the branches it told."""
    loop = Loop(pipe, STEPS, seed=0)
    text = loop.encode(PROMPTS)
    negative = loop.encode(["", ""]) if guidance else None
    told = []

    def drive(clock):
        step_of = Lockstep(loop, text, negative, lambda t: guidance, clock, guides)
        told.extend(step_of.branches(step))
        with torch.no_grad():
            return step_of(latents, step)

    return probe.trace(pipe, *handlers).run(drive, PROMPTS), told


def by_hand(pipe, latents, step, texts, kind="plain"):
    """The model's output for clips one by one, in a loop without a trace."""
    loop = Loop(pipe, STEPS, seed=0)

    def replaced(plain, q, k, v, **rest):
        return plain(q, k, PATCHES[kind](v) if q.shape[-2] == JOINT else v, **rest)

    text = loop.encode(texts)
    with patched_attention(replaced), torch.no_grad():
        return torch.cat([loop.forward(latents[i : i + 1], text[i : i + 1], step) for i in range(len(texts))])


def close(ours, expected):
    return (ours - expected).abs().max() < 1e-12 * expected.abs().max()


@pytest.mark.parametrize("step", [0, 2])
def test_the_formula_with_classifier_free_guidance(pipe, latents, step):
    ours, _ = predicted(pipe, latents, step, Guide(1.5), handlers=[Flat(where=at("perturbed"))])
    u, c = by_hand(pipe, latents, step, ["", ""]), by_hand(pipe, latents, step, PROMPTS)
    p = by_hand(pipe, latents, step, PROMPTS, "perturbed")
    assert close(ours, u + SCALE * (c - u) + 1.5 * (c - p))
    assert not close(ours, u + SCALE * (c - u))


def test_the_formula_without_classifier_free_guidance(pipe, latents):
    ours, told = predicted(pipe, latents, 1, Guide(0.7), guidance=None, handlers=[Flat(where=at("perturbed"))])
    c, p = (by_hand(pipe, latents, 1, PROMPTS, kind) for kind in ("plain", "perturbed"))
    assert close(ours, c + 0.7 * (c - p))
    assert [(b.prompt, b.role, b.guided) for b in told] == [
        (0, "plain", True),
        (1, "plain", True),
        (0, "perturbed", True),
        (1, "perturbed", True),
    ]


def test_guides_add_up_and_choose_prompts(pipe, latents):
    guides = Guide(2.0), Guide(-0.5, role="loud", prompts=1)
    edits = [Flat(where=at("perturbed")), Loud(where=at("loud"))]
    ours, told = predicted(pipe, latents, 0, *guides, handlers=edits)
    u, c = by_hand(pipe, latents, 0, ["", ""]), by_hand(pipe, latents, 0, PROMPTS)
    p, loud = (by_hand(pipe, latents, 0, PROMPTS, kind) for kind in ("perturbed", "loud"))
    expected = u + SCALE * (c - u) + 2.0 * (c - p)
    expected[1] -= 0.5 * (c - loud)[1]
    assert close(ours, expected)
    assert [(b.prompt, b.role) for b in told[4:]] == [(0, "perturbed"), (1, "perturbed"), (1, "loud")]
    assert [b.guided for b in told] == [False] * 2 + [True] * 5


def test_guides_add_up_without_classifier_free_guidance(pipe, latents):
    edits = [Flat(where=at("perturbed")), Loud(where=at("loud"))]
    ours, _ = predicted(pipe, latents, 0, Guide(2.0), Guide(1.0, role="loud"), guidance=None, handlers=edits)
    c, p, loud = (by_hand(pipe, latents, 0, PROMPTS, kind) for kind in ("plain", "perturbed", "loud"))
    assert close(ours, c + 2.0 * (c - p) + (c - loud))


def test_two_guides_of_one_role_share_its_pass(pipe, latents):
    edit = Flat(where=at("perturbed"))
    both, told = predicted(pipe, latents, 0, Guide(2.0), Guide(0.5, prompts=0), handlers=[edit])
    assert len(told) == 6
    one, _ = predicted(pipe, latents, 0, Guide(2.5), handlers=[edit])
    other, _ = predicted(pipe, latents, 0, Guide(2.0), handlers=[edit])
    assert close(both, torch.stack([one[0], other[1]]))


def test_the_perturbed_pass_leaves_the_others_alone(pipe, latents):
    """With a weight so small that it vanishes, the rest is the plain guided prediction."""
    ours, _ = predicted(pipe, latents, 0, Guide(1e-30), handlers=[Flat(where=at("perturbed"))])
    plain, _ = predicted(pipe, latents, 0)
    assert close(ours, plain)


def test_a_guide_of_weight_zero_changes_no_bit():
    pipe = tiny.pipeline()

    def run(*guides):
        loop = Loop(pipe, STEPS, seed=0)
        text, negative = loop.encode(PROMPTS), loop.encode(["", ""])
        start = State.start(loop, 2, loop.clip_frames, text.dtype)
        return denoise(loop, Lockstep(loop, text, negative, lambda t: SCALE, guides=guides), start).latents

    plain = run()
    for guide in (Guide(0.0), Guide(lambda p: 0.0), Guide(3.0, steps=()), Guide(3.0, prompts=())):
        assert torch.equal(run(guide), plain)
    assert torch.equal(run(Guide(1.0), Guide(-1.0)), plain)


def test_perturbed_passes_run_only_where_they_weigh(pipe):
    loop = Loop(pipe, STEPS, seed=0)
    text = loop.encode(PROMPTS)
    count = lambda *guides: Lockstep(loop, text, text, lambda t: SCALE, guides=guides).clip_forwards()  # noqa: E731
    assert count() == [4, 4, 4, 4]
    assert count(Guide(1.0)) == [6, 6, 6, 6]
    assert count(Guide(1.0, steps=Progress(0.25, 0.75))) == [4, 6, 6, 4]
    assert count(Guide(Ramp(2.0, 0.0, 0.5, 0.5, "step"), prompts={1})) == [5, 5, 4, 4]
    assert count(Guide(1.0), Guide(-1.0)) == [4, 4, 4, 4]
    assert count(Guide(1.0, steps=0), Guide(1.0, role="loud", steps=slice(0, 2))) == [8, 6, 4, 4]


def test_what_cannot_be_guided_is_refused(pipe):
    with pytest.raises(UsageError, match="role of its own.*Got 'plain'"):
        Guide(1.0, role="plain")
    loop = Loop(pipe, STEPS, seed=0)
    text = loop.encode(PROMPTS)
    for guide in (Guide(1.0, steps=9), Guide(1.0, prompts=2)):
        with pytest.raises(UsageError, match="selection must lie in"):
            Lockstep(loop, text, text, lambda t: SCALE, guides=(guide,))
