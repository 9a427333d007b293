"""Reuse against the matrix, step by step."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import probe
from control.bias import Bias
from control.reuse import Reuse
from control.shadow import shadow
from control.sparsify import Sparsify
from control.transfer import Transfer
from control.window import Window
from probe.call import AttentionCall
from probe.errors import PlanError, UsageError
from probe.layout import Grid, TokenLayout
from probe.plan import Plan
from probe.region import frames, text
from probe.serve import after_attention, before_attention
from probe.site import Branch, Site, Where, Which
from tests import tiny
from tests.oracle import weights
from tests.toys import Case
from tests.toys.bench import Keep, bench_of, matrix

pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast")  # Mochi's own, on every CPU

NEAR = Window(frames=0)


@pytest.fixture(scope="module")
def pipe():
    return tiny.pipeline()


def allowed(call, row):
    """bool [N, M]: the keys of a window of one frame; text is seen and sees all."""
    frame = []
    for side in call.sides(row):
        of = torch.full((side.total,), -1)
        for f in range(side.frames):
            of[side.frame_slice(f)] = f
        frame.append(of)
    rows, columns = frame[0][:, None], frame[1][None]
    return (rows == columns) | (rows < 0) | (columns < 0)


def parts(call, row, heads):
    """Of the matrix: rho [h, n], O_window and O [h, n, D] over the tokens that can be seen."""
    p, v = matrix(call, row)[heads], call.v[row].double()[heads]
    v = v[:, : p.shape[-1]]
    p = p[:, : call.sides(row)[0].total]
    inside = p * allowed(call, row)
    rho = inside.sum(-1)
    return rho, inside / rho[..., None] @ v, p @ v


@pytest.mark.parametrize("case", ["cogvideox", "hunyuan", "mochi", "wan"])
def test_windowed_steps_equal_the_matrix(case):
    """Full before step 1 and at steps 1 and 4; head 1 of the conditional half alone."""
    bench, keep = bench_of(Case(case)), Keep()
    where = Where(heads=1, branches=Which(guided=True))
    edit = Reuse(NEAR, period=3, warm=1, drift=0.3, where=where)
    latents = bench.latents(edit, keep, steps=6)
    cached, windowed = {}, 0
    for call in keep.calls:
        for row, branch in enumerate(call.branches):
            step, key, size = call.site.step, (call.site.layer, call.site.kind, branch), call.sides(row)[0].total
            rho, narrow, whole = parts(call, row, [1])
            expected = matrix(call, row)[:, :size] @ call.v[row].double()[:, : matrix(call, row).shape[-1]]
            if branch.guided and call.site.kind != "cross":
                if step in (1, 4):
                    cached[key] = rho, whole - rho[..., None] * narrow
                elif step > 1:
                    kept, rest = cached[key]
                    grown = (kept + 0.3 * ((step - 1) % 3 - 1)).clamp_max(1)
                    expected[[1]] = grown[..., None] * narrow + rest
                    windowed += 1
            assert (call.out[row, :, :size].double() - expected).abs().max() < 5e-6
    assert windowed
    assert not torch.equal(latents, bench.latents(steps=6))
    assert torch.equal(bench.latents(replace(edit, warm=6), steps=6), bench.latents(steps=6))
    assert torch.equal(bench.latents(replace(edit, period=1), steps=6), bench.latents(steps=6))


@pytest.mark.parametrize("bias", [0.0, 1.5])
def test_with_unchanged_tensors_a_windowed_step_is_the_full_one(bias):
    """Also beside a bias of the same branch."""
    layout = TokenLayout("text-video", 3, Grid(2, 2, 3))
    q, k, v = torch.randn(3, 1, 2, layout.total, 8, generator=torch.Generator().manual_seed(0)).unbind()
    inside = torch.from_numpy(frames(0).mask(layout))
    edit, outs = Reuse(NEAR, period=4, warm=0, drift=0.0), []
    plan = Plan([edit, Bias(bias, frames(0))] if bias else [edit], steps=3, layers=1)
    for step in range(3):
        call = AttentionCall(Site(step, 0, 0), q, k, v, None, layout, (Branch(),))
        before_attention(call, plan)
        outs.append(call.out)
    favoured = weights(q, k) * (1 + (math.exp(bias) - 1) * inside)
    whole = favoured / favoured.sum(-1, keepdim=True) @ v.double()
    assert (outs[0] - whole).abs().max() < 1e-6
    assert (outs[1] - whole).abs().max() < 1e-6
    assert torch.equal(outs[1], outs[2])
    assert edit.bytes == 2 * layout.total * (8 + 1) * 4
    edit.end()
    assert edit.bytes == 0


def test_other_edits_of_the_same_call_stay(pipe):
    """A bias of one branch, and keys of another: in full and in windowed steps, of the matrix."""
    keep, near = Keep(Where(layers=1)), Reuse(NEAR, period=3, warm=0, drift=0.0, where=Where(branches=Which(prompt=1)))
    others = [Bias(2.0, text(), where=Where(branches=Which(prompt=0))), Transfer("k", 0, 1)]
    tiny.latents(probe.trace(pipe, near, *others, keep), [tiny.PROMPT, tiny.OTHER])
    for call in keep.calls:
        for row, branch in enumerate(call.branches):
            if branch.prompt == 0 and branch.guided:
                real = torch.tensor(call.prompts[0].padding).logical_not().nonzero().flatten()
                logits = call.q[row].double() @ call.k[row].double().mT / 4
                logits[:, :, real] += 2
                assert (call.out[row] - logits.softmax(-1) @ call.v[row].double()).abs().max() < 5e-6
            if branch.prompt == 1:
                assert torch.equal(call.k[row], call.own["k"][row - 1])
                *_, whole = parts(call, row, [0, 1])
                full = (call.out[row] - whole).abs().max() < 5e-6
                assert full == (call.site.step % 3 == 0)


LAYOUT = TokenLayout("text-video", 3, Grid(2, 2, 3))


def calls_of(*edits, native=True, same=False):
    """The calls of four steps of two prompts, three heads, in double precision; the `same` tensors, or new ones."""
    plan, made = Plan(edits, steps=4, layers=1, heads=3), []
    for step in range(4):
        generator = torch.Generator().manual_seed(0 if same else step)
        q, k, v = torch.randn(3, 2, 3, LAYOUT.total, 8, generator=generator, dtype=torch.float64).unbind()
        call = AttentionCall(Site(step, 0, 0), q, k, v, None, LAYOUT, (Branch(0), Branch(1)), native=native)
        before_attention(call, plan)
        after_attention(call, plan, F.scaled_dot_product_attention(q, k, v) if call.out is None else call.out)
        made.append(call)
    return made


def often(window, warm=0):
    return Reuse(window, period=2, warm=warm)


def at(**place):
    branches = Which(prompt=place.pop("prompt")) if "prompt" in place else None
    return Where(branches=branches, **place)


ALONE = {
    "two heads": [
        [often(Window(frames=0, where=at(heads=0)))],
        [often(Window(radius=1, where=at(heads={1, 2})))],
    ],
    "two prompts": [
        [often(Window(frames=0, where=at(prompt=0)))],
        [often(Window(radius=1, where=at(prompt=1)))],
    ],
    "full in turn": [
        [often(Window(frames=0, where=at(heads=0)))],
        [often(Window(radius=1, where=at(heads=2)), warm=1), Bias(2.0, frames(0), where=at(heads=2))],
    ],
    "sparse weights": [
        [often(Window(frames=0, where=at(heads=0, prompt=1)))],
        [Sparsify(0.3, where=at(heads=1))],
    ],
    "all of these": [
        [often(Window(frames=0, where=at(heads=0, prompt=0)))],
        [Sparsify(0.3, where=at(heads=0, prompt=1))],
        [often(Window(radius=1, where=at(heads={1, 2}, prompt=0)), warm=1)],
        [Bias(2.0, frames(0), where=at(heads={1, 2}, prompt=1))],
    ],
}


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("groups", ALONE.values(), ids=ALONE)
def test_each_place_is_as_with_its_own_edits_alone(groups, native):
    """Whatever the order of the edits."""
    expected = [call.out for call in calls_of(native=native)]
    plain = [out.clone() for out in expected]
    for edits in groups:
        for whole, call in zip(expected, calls_of(*edits, native=native), strict=True):
            rows, heads = edits[0].where.rows(call.branches), edits[0].where.head_list(3)
            for place in ((row, head) for row in rows for head in heads):
                whole[place] = call.out[place]
    every = [edit for edits in groups for edit in edits]
    for order in (every, every[::-1]):
        for call, whole, own in zip(calls_of(*order, native=native), expected, plain, strict=True):
            assert (call.out - whole).abs().max() < 1e-6
            assert call.site.step != 1 or (call.out - own).abs().max() > 1e-2


@pytest.mark.parametrize("native", [True, False])
def test_at_the_same_place_the_full_attention_is_that_of_the_other_edits(native):
    """With unchanged tensors and no drift every step equals that of the sparse weights alone; else none after."""
    sparse, reuse = Sparsify(0.3), Reuse(NEAR, period=4, warm=0, drift=0.0, where=Where(heads={0, 2}))
    for order in ([reuse, sparse], [sparse, reuse]):
        for same in (True, False):
            wholes = calls_of(sparse, native=native, same=same)
            for call, whole in zip(calls_of(*order, native=native, same=same), wholes, strict=True):
                apart = (call.out - whole.out).abs().amax((0, 2, 3))
                assert apart[1] < 1e-6
                assert (apart < 1e-6).all() if same or call.site.step == 0 else (apart[[0, 2]] > 1e-2).all()
    with pytest.raises(PlanError, match="same tensor at the same place"):
        calls_of(often(NEAR), often(Window(radius=1)))


@pytest.mark.parametrize("native", [True, False])
def test_readouts_at_windowed_steps_see_the_full_map_with_the_other_edits(native):
    """Of its own heads, of the others, and of the other prompt."""
    edits = often(Window(frames=0, where=at(prompt=0, heads={0, 1}))), Bias(2.0, frames(0), where=at(heads={1, 2}))
    inside = torch.from_numpy(frames(0).mask(LAYOUT))
    for call in calls_of(*edits, native=native):
        logits = call.q @ call.k.mT * 8**-0.5
        logits[:, 1:] += 2 * inside
        for row in range(2):
            assert (call.entry(row).weights() - logits[row].softmax(-1)).abs().max() < 1e-5


def test_reuse_refuses():
    with pytest.raises(UsageError, match="Give these to its window"):
        Reuse(NEAR, strength=0.5)
    with pytest.raises(UsageError, match="period of 1 or more"):
        Reuse(NEAR, period=0)
    with pytest.raises(UsageError, match="must be an edit of the weights. Got Transfer"):
        Reuse(Transfer("k", 0, 1))


def test_a_reuse_is_where_its_window_is_and_leaves_that_alone():
    window = Window(frames=0, where=Where(layers=1))
    assert Reuse(window).where == Where(layers=1)
    assert Reuse(window, where=Where(layers=2)).window.where == Where(layers=2)
    assert window.where == Where(layers=1)
    assert str(Reuse(window)) == "Reuse(Window(0 frames), full every 5 steps from step 15)"


def test_a_shadow_does_not_reach_its_call():
    layout = TokenLayout("text-video", 0, Grid(2, 1, 3))
    q = torch.zeros(1, 1, 6, 4)
    call = AttentionCall(Site(0, 0, 0), q, q, q, None, layout, (Branch(),))
    call.writable("k").fill_(1)
    copy = shadow(call)
    assert torch.equal(copy.k, call.k)
    assert copy.own == call.own
    copy.writable("k").fill_(2)
    NEAR.begin((), 1, 1)
    NEAR.serve(copy, (0,))
    assert call.k.unique().tolist() == [1]
    assert call.own["k"].unique().tolist() == [0]
    assert copy.changes
    assert call.changes == []
    assert call.out is None


def test_what_an_entry_kept_before_it_had_another_role_is_not_reused(pipe):
    """Full at steps 0 and 3; at step 5 the plain entry was last seen at step 0."""
    edit, drawn = Reuse(NEAR, period=3, warm=0, drift=0.0, where=Where(branches=Which(guided=True))), []
    x = torch.randn(1, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    words = torch.randn(1, tiny.TEXT, 16, generator=torch.Generator().manual_seed(1))

    def forward(step):
        return pipe.transformer(x * (1 + step), words, torch.full((1,), 500), return_dict=False)[0]

    def drive(clock):
        for step, role in enumerate(("plain", *["source"] * 4, "plain")):
            clock.tell(step, 6, [Branch(role=role)])
            drawn.append(forward(step))

    with torch.no_grad():
        probe.trace(pipe, edit).run(drive, [tiny.PROMPT])
        assert not torch.equal(drawn[2], forward(2))  # kept at step 1, when the role was new
        assert torch.equal(drawn[5], forward(5))
