"""Transfer against independent patches of stock pipelines and against the matrix."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb

import control
import probe
from control.edit import Edit
from control.match import Match
from control.source import Itself
from probe.errors import PlanError, UsageError
from probe.plan import Stage
from probe.region import box, video, words
from probe.site import Progress, Where, Which
from tests import tiny
from tests.control.drawn import drawn, served
from tests.oracle import JointCalls, patched_attention, weights
from tests.toys import Case
from tests.toys.bench import Keep, bench_of
from tests.toys.stock import arguments_of

pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast")  # Mochi's own, on every CPU

BOTH = [tiny.PROMPT, tiny.OTHER]
LAYOUT = probe.TokenLayout("text-video", tiny.TEXT, probe.Grid(3, 4, 4))
ALIKE = [tiny.PROMPT, "a blue dog sits right"]  # as many tokens


@pytest.fixture(scope="module", params=[False, True], ids=["sincos", "rotary"])
def pipe(request):
    return tiny.pipeline(rotary=request.param)


@pytest.fixture(scope="module")
def plain(pipe):
    return tiny.latents(pipe, BOTH)


@pytest.fixture(scope="module", params=["cogvideox", "sd3", "mochi", "wan"])
def bench(request):
    return bench_of(Case(request.param))


def traced(pipe, *handlers, prompts=BOTH):
    return tiny.latents(probe.trace(pipe, *handlers), prompts)


# --- the batch of CogVideoX, against a patch of its attention ---


@pytest.mark.parametrize("tensors", ["k", "v", "kv", "q", "qk", "qkv"])
def test_transfer_equals_an_independent_patch(pipe, plain, tensors):
    where = Where(steps=slice(1, 3), layers={0, 2})
    edited = traced(pipe, control.Transfer(tensors, source=0, target=1, where=where))
    calls = JointCalls(3, tiny.TEXT + 48)

    def shared(own, q, k, v, **rest):
        at = calls.next(q)
        if at is not None and at[0] in (1, 2) and at[1] in (0, 2):
            index = [0, 0, 2, 2]  # unconditional, conditional; the second prompt reads the first
            q, k, v = (x[index] if name in tensors else x for name, x in zip("qkv", (q, k, v), strict=True))
        return own(q, k, v, **rest)

    with patched_attention(shared):
        expected = tiny.latents(pipe, BOTH)
    assert torch.equal(edited, expected)
    assert torch.equal(edited[0], plain[0])
    assert not torch.equal(edited[1], plain[1])


def test_transfer_of_the_output_equals_an_independent_patch(pipe, plain):
    edited = traced(pipe, control.Transfer("o", source=0, target=1, where=Where(layers=1, heads=1)))
    calls = JointCalls(3, tiny.TEXT + 48)

    def shared(own, q, k, v, **rest):
        at, out = calls.next(q), own(q, k, v, **rest)
        if at is not None and at[1] == 1:
            out = out.clone()
            out[1, 1], out[3, 1] = out[0, 1], out[2, 1]
        return out

    with patched_attention(shared):
        assert torch.equal(edited, tiny.latents(pipe, BOTH))
    assert not torch.equal(edited[1], plain[1])


def test_transfer_of_some_heads(pipe):
    every = traced(pipe, control.Transfer("kv", 0, 1, where=Where(heads={0, 1})))
    assert torch.equal(every, traced(pipe, control.Transfer("kv", 0, 1)))
    assert not torch.equal(every, traced(pipe, control.Transfer("kv", 0, 1, where=Where(heads=1))))


@pytest.mark.parametrize(
    "nothing",
    [
        control.Transfer("qkv", source=lambda branch: branch),
        control.Transfer("kv", source=lambda branch: None),
        control.Transfer("qkv", Itself()),
        control.Transfer("o", Itself()),
        control.Transfer("qkv", Itself(), strength=0.3, gate=torch.rand(3, 4, 4), mapping=range(48)),
        control.Transfer("qkv", 0, 1, strength=0.0),
        control.Transfer("qkv", 0, 1, gate=torch.zeros(3, 4, 4)),
        control.Transfer("o", 0, 1, rows=video() & ~video()),
        control.Transfer("kv", 0, 1, mapping=[-1] * 48, rows=video()),
    ],
    ids=str,
)
def test_what_changes_nothing_keeps_every_bit(pipe, plain, nothing):
    assert torch.equal(traced(pipe, nothing), plain)


@pytest.mark.parametrize("tensors", ["kv", "o"])
def test_chained_transfers_do_not_depend_on_their_order(pipe, tensors):
    three = [*BOTH, "the cat sits on grass"]
    here = Where(steps=0, layers=0)
    one, other = control.Transfer(tensors, 0, 1, where=here), control.Transfer(tensors, 1, 2, where=here)
    first = traced(pipe, one, other, prompts=three)
    assert torch.equal(first, traced(pipe, other, one, prompts=three))
    assert torch.equal(first[2], traced(pipe, other, prompts=three)[2])
    assert not torch.equal(first[2], traced(pipe, one, prompts=three)[2])


@dataclass(eq=False)
class Louder(Edit):
    """Doubles the output, before transfers of it."""

    stage: Stage = Stage.MERGE
    rank, touches = 2, frozenset({"out"})

    def apply(self, call, entry, amount):
        call.writable("out")[entry] *= 2


def test_chained_outputs_do_not_depend_on_their_order_after_another_merge(pipe):
    three, here = [*BOTH, "the cat sits on grass"], Where(steps=0, layers=0)
    both = [control.Transfer("o", i, i + 1, where=here) for i in (0, 1)]
    orders = [traced(pipe, Louder(where=here), *edits, prompts=three) for edits in (both, both[::-1])]
    assert torch.equal(*orders)
    assert not torch.equal(orders[0], traced(pipe, *both, prompts=three))


# --- every family, by indexing ---


def kept(bench, *edits, prompts=BOTH, **where):
    """The calls of a run with edits, and its latents."""
    keep = Keep(Where(**where))
    latents = bench.latents(*edits, keep, prompt=prompts)
    return keep.calls, latents


def own_of(calls, call, branch, name):
    """The unedited tensor of a branch at the same step, layer and kind, wherever it was served."""
    here = (call.site.step, call.site.layer, call.site.kind)
    same = [one for one in calls if (one.site.step, one.site.layer, one.site.kind) == here and branch in one.branches]
    return same[0].own[name][same[0].branches.index(branch)].double()


def targets(calls, prompt=1):
    """The calls and batch entries of a prompt."""
    return [(call, row) for call in calls for row, branch in enumerate(call.branches) if branch.prompt == prompt]


@pytest.mark.parametrize("half", [None, True, False])
def test_soft_transfers_equal_indexing(bench, half):
    """Prompts of different length and video rows: also where entries, or the halves, are served one by one."""
    shape = kept(bench, probe.RegionMass(where=Where(layers=0)))[0][0].layout.grid.shape
    gate = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    where = Where(heads=1, branches=None if half is None else Which(guided=half))
    edit = control.Transfer("qkv", 0, 1, rows=box(0, 1, 2, 3), gate=gate, strength=0.6, where=where)
    calls, latents = kept(bench, edit)
    moved = 0
    for call, row in targets(calls):
        branch = call.branches[row]
        for name in "qkv":
            layout = call.columns if name in "kv" else call.rows
            expected = call.own[name][row].double()
            if layout.video and half in (None, branch.guided):
                source = own_of(calls, call, replace(branch, prompt=0), name)
                for f in range(shape[0]):
                    for y in range(2):
                        for x in (1, 2):
                            r, g = layout.frame_slice(f).start + y * shape[2] + x, 0.6 * gate[f, y, x].double()
                            expected[1, r] = (1 - g) * expected[1, r] + g * source[1, r]
                            moved += 1
            assert (getattr(call, name)[row].double() - expected).abs().max() < 1e-6
    assert moved
    plain = bench.latents(prompt=BOTH)
    assert torch.equal(latents[0], plain[0])
    assert not torch.equal(latents[1], plain[1])


def test_a_whole_map_transfer_is_the_sources_map_on_own_values(bench):
    """O = P_source V_target, with q and k of all rows and prompts of one length."""
    calls, _ = kept(bench, control.Transfer("qk", 0, 1), prompts=ALIKE)
    moved = 0.0
    for call, row in targets(calls):
        q, k = (own_of(calls, call, replace(call.branches[row], prompt=0), name)[None] for name in "qk")
        own, v = weights(call.own["q"][row][None], call.own["k"][row][None]), call.own["v"][row].double()
        expected = weights(q, k)[0] @ v
        assert (call.out[row].double() - expected).abs().max() < 5e-6
        moved = max(moved, (expected - own[0] @ v).abs().max())
    assert moved > 1e-3


def test_a_transfer_on_the_video_moves_the_conditional_map_alone(pipe):
    keep = Keep()
    traced(pipe, control.Transfer("qk", 0, 1, rows=video()), keep)
    call = next(call for call in keep.calls if (call.site.step, call.site.layer) == (1, 1))
    source, edited = (weights(call.q[row][None], call.k[row][None])[0, :, tiny.TEXT :] for row in (2, 3))
    assert torch.equal(call.own["q"][2], call.q[2])
    one, other = (p[..., tiny.TEXT :] / p[..., tiny.TEXT :].sum(-1, keepdim=True) for p in (source, edited))
    assert (one - other).abs().max() < 1e-12
    assert (source - edited)[..., : tiny.TEXT].sum(-1).abs().max() > 1e-4


def test_text_of_another_length_is_refused_and_video_is_not():
    for name in ("hunyuan", "mochi"):
        bench = bench_of(Case(name))
        prompts = [tiny.PROMPT, "a dog sits on the red grass and snow"]
        with pytest.raises(PlanError, match=r"both prompts have.*visible keys for.*layer 0.*rows=video\(\)"):
            bench.latents(control.Transfer("kv", 0, 1), prompt=prompts)
        calls, _ = kept(bench, control.Transfer("kv", 0, 1, rows=video()), prompts=prompts)
        for call, row in targets(calls):
            source, inside = own_of(calls, call, replace(call.branches[row], prompt=0), "k"), call.rows.video_slice
            assert torch.equal(call.k[row, :, inside].double(), source[:, inside])
            text = call.rows.text_slice
            assert torch.equal(call.k[row, :, text], call.own["k"][row, :, text])
            assert not torch.equal(call.k[row, :, inside], call.own["k"][row, :, inside])


def test_words_that_both_prompts_have_are_taken_though_one_is_longer():
    """Hidden and left-out padding; a word behind the end of the shorter prompt is refused."""
    for name in ("hunyuan", "mochi"):
        bench = bench_of(Case(name))
        prompts = [tiny.PROMPT, f"{tiny.PROMPT} on grass"]
        calls, _ = kept(bench, control.Transfer("kv", 0, 1, rows=words("red cat")), prompts=prompts)
        for call, row in targets(calls):
            source = own_of(calls, call, replace(call.branches[row], prompt=0), "k")
            start, theirs = call.rows.text_slice.start, call.k[row] != call.own["k"][row]
            (changed,) = theirs.any(-1).any(0).nonzero(as_tuple=True)
            spoken = call.prompts[1].tokens_of("red cat") if call.branches[row].guided else ()
            assert changed.tolist() == [start + token for token in spoken]  # video first: one place in both
            for token in changed.tolist():
                assert torch.equal(call.k[row, :, token].double(), source[:, token])
        with pytest.raises(PlanError, match="both prompts have"):
            kept(bench, control.Transfer("kv", 0, 1, rows=words("grass")), prompts=prompts)


# --- other rows, and constants ---


def one_call(pipe, *edits):
    """Step 1, layer 1 of a run: rows [u0, u1, c0, c1]."""
    keep = Keep(Where(steps=1, layers=1))
    traced(pipe, *edits, keep)
    return keep.calls[0]


@pytest.mark.parametrize("given", ["numbers", "array", "function"])
def test_rows_move_by_a_mapping(pipe, given):
    """Each frame takes from the next one of the source; the last one keeps its own, and so does the text."""
    numbers = [token + 16 if token < 32 else -1 for token in range(48)]
    mapping = {
        "numbers": numbers,
        "array": np.array(numbers).reshape(3, 4, 4),
        "function": lambda token: torch.where(token < 32, token + 16, -1),
    }[given]
    call = one_call(pipe, control.Transfer("v", 0, 1, rows=video(), mapping=mapping))
    for row, source in ((1, 0), (3, 2)):
        expected, at = call.own["v"][row].clone(), tiny.TEXT
        expected[:, at : at + 32] = call.own["v"][source, :, at + 16 : at + 48]
        assert torch.equal(call.v[row], expected)


def test_a_mapping_has_one_number_per_token(pipe):
    for mapping, said in (([0, 1, 2], "Got 3 up to 2"), ([*range(47), 48], "-1 to 47. Got 48 up to 48")):
        with pytest.raises(UsageError, match=f"one number per video token, 48, .*{said}"):
            traced(pipe, control.Transfer("v", 0, 1, mapping=mapping))


def test_what_moves_is_turned_to_where_it_lands(pipe):
    """Undone and done afresh by diffusers' own rotation."""
    mapping = torch.arange(48).flip(0)
    moved = {at: control.Transfer("qk", 0, 1, mapping=mapping, positions=at) for at in ("source", "target")}
    if not pipe.transformer.config.use_rotary_positional_embeddings:
        with pytest.raises(PlanError, match="only where the model rotates them"):
            one_call(pipe, moved["target"])
        return
    (inputs, *_) = arguments_of(pipe.transformer, lambda: tiny.latents(pipe, BOTH, steps=1))
    cos, sin = inputs["image_rotary_emb"]
    kept, turned = (one_call(pipe, edit) for edit in moved.values())
    for name in "qk":
        source = kept.own[name][2:3, :, tiny.TEXT :].double()
        bare = apply_rotary_emb(source, (cos.double(), -sin.double()))[:, :, mapping]
        expected = apply_rotary_emb(bare, (cos.double(), sin.double()))
        assert torch.equal(getattr(kept, name)[3, :, tiny.TEXT :], kept.own[name][2, :, tiny.TEXT :][:, mapping])
        assert (getattr(turned, name)[3:, :, tiny.TEXT :].double() - expected).abs().max() < 1e-5


# --- ConsistEdit ---


def consist(mask, alpha):
    """Its edit of a mask (1: edit here) and a structure strength: q, k whole before `alpha`, else outside the mask."""
    late = Where(steps=Progress(alpha, 1))
    edits = [control.Transfer("qk", 0, 1, rows=video(), gate=1 - mask, where=late)]
    if alpha:
        edits.append(control.Transfer("qk", 0, 1, rows=video(), where=Where(steps=Progress(0, alpha))))
    return [*edits, control.Transfer("v", 0, 1, rows=video(), gate=1 - mask)]


def test_consistedit_of_everything_without_structure_is_plain(pipe, plain):
    assert torch.equal(traced(pipe, *consist(torch.ones(3, 4, 4), 0)), plain)


@pytest.fixture(scope="module")
def noise():
    """One for both entries."""
    return torch.randn(1, 3, 4, 8, 8, generator=torch.Generator().manual_seed(5)).expand(2, -1, -1, -1, -1)


def test_consistedit_of_nothing_keeps_the_video_if_the_text_is_shared_too(pipe, noise):
    whole = probe.trace(pipe, control.Transfer("qkv", 0, 1))
    edited, own = tiny.latents(whole, BOTH, latents=noise), tiny.latents(pipe, BOTH, latents=noise)
    assert torch.equal(edited[0], edited[1])
    assert torch.equal(edited[0], own[0])
    assert not torch.equal(own[0], own[1])


def test_consistedit_of_one_prompt_and_noise_changes_nothing(pipe, noise):
    twice = [tiny.PROMPT] * 2
    edited = tiny.latents(probe.trace(pipe, *consist(torch.rand(3, 4, 4), 0.5)), twice, latents=noise)
    assert torch.equal(edited, tiny.latents(pipe, twice, latents=noise))


# --- refusals ---


def test_transfer_refuses(pipe):
    for names, said in (("kx", "tensors among q, k, v, o"), ("kk", "tensors among"), ("ko", "one of its own")):
        with pytest.raises(UsageError, match=said):
            control.Transfer(names, source=0)
    for edit in (control.Transfer("kv", source=3, target=0), control.Transfer("kv", source=0, target=2)):
        with pytest.raises(PlanError, match="prompts of the run, 0 to 1. Got Transfer"):
            traced(pipe, edit)
    role = control.Transfer("kv", lambda branch: replace(branch, role="source"))
    with pytest.raises(
        PlanError, match="in the same attention call.*source for unconditional prompt 0.*which has: unc"
    ):
        traced(pipe, role)


def test_the_plan_says_what_a_transfer_does(pipe):
    edit = control.Transfer("kv", 0, 1, rows=video(), mapping=Match(features="k", threshold=0.5))
    assert str(edit) == "Transfer(kv from prompt 0 to prompt 1, video, Match(k > 0.5))"
    assert probe.trace(pipe, control.Transfer("kv", 0, 1)).plan(4).cost(LAYOUT) == 0
    assert probe.trace(pipe, edit).plan(4).cost(LAYOUT) == pytest.approx(0.5 * 0.8**2)


def test_a_transfer_that_meets_only_its_source_is_refused():
    """Sources are looked at in calls of their own, which does not make the transfer meet its target."""
    pipe = tiny.pipeline()
    none = probe.Where(branches=lambda branch: branch.segment == 3)
    with pytest.raises(PlanError, match="met none"):
        tiny.latents(
            probe.trace(pipe, control.Transfer("kv", source=0, where=none)), [tiny.PROMPT, tiny.OTHER], steps=2
        )


def test_the_output_of_a_source_is_taken_before_it_is_merged():
    """Scale(o) of the source comes first; the target still gets what the source's attention gave."""
    taken = served(
        drawn(), control.Scale("o", 0.0, where=Where(branches=Which(prompt=1))), control.Transfer("o", 1, target=0)
    )
    assert torch.equal(taken[0], served(drawn())[1])
    assert not taken[1].any()
