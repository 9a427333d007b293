"""Forks and their variants against the whole matrix in float64; rows and calls they leave alone."""

import math

import pytest
import torch

import probe
from control.bias import Bias
from control.closed_form import Fixed, Identity, MeanOf, Sharpest, Uniform, Within
from control.fork import Fork
from control.reuse import Reuse
from control.scale import Scale, Temper
from control.strength import Ramp
from control.transfer import Transfer
from control.variant import Edited
from control.window import Window
from probe.attend import State
from probe.errors import PlanError, UsageError
from probe.plan import Plan
from probe.region import frames, padding, text, tokens, video, words
from probe.serve import after_attention
from probe.site import Site, Where, Which
from tests import tiny
from tests.control.drawn import GRID, STEPS, TEXT, apart, drawn, hidden, served, whole
from tests.oracle import JointCalls, patched_attention
from tests.toys import Case
from tests.toys.bench import bench_of

FIRST = Where(branches=Which(prompt=0))
VARIANTS = (
    Edited(Temper(2.0)),
    Identity(),
    Identity(beside=text()),
    Within(Identity(), video()),
    Uniform(),
    Sharpest(),
    MeanOf(video()),
    Fixed(0.5),
)


def mask(*cells):
    found = torch.zeros(GRID.shape)
    for cell in cells:
        found[cell] = 1
    return found


def counted(monkeypatch):
    """The numbers of query-key pairs of each fused attention."""
    from probe import attend

    pairs, plain = [], attend.partial

    def partial(q, k, *rest):
        pairs.append(q.shape[1] * q.shape[2] * k.shape[2])
        return plain(q, k, *rest)

    monkeypatch.setattr(attend, "partial", partial)
    return pairs


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_strength_zero_and_an_empty_gate_keep_every_bit(variant):
    plain = served(drawn(dtype=torch.bfloat16))
    for given in ({"strength": 0.0}, {"gate": mask()}, {"gate": words("cat"), "rows": video()}):
        assert torch.equal(served(drawn(dtype=torch.bfloat16), Fork(variant, **given)), plain)
    assert not torch.equal(served(drawn(dtype=torch.bfloat16), Fork(variant)), plain)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_rows_heads_and_entries_it_is_not_for_keep_their_bits(variant):
    where = Where(heads=(0, 2), branches=Which(prompt=1))
    out, plain = served(drawn(), Fork(variant, gate=mask((0, 1, 2), (2, 0, 0)), where=where)), served(drawn())
    changed = (out != plain).any(-1)
    expected = torch.zeros_like(changed)
    expected[1, 0:3:2, [TEXT + 6, TEXT + 16]] = True
    assert torch.equal(changed, expected)


def test_the_output_is_blended_by_gate_times_strength():
    gate = torch.rand(GRID.shape, generator=torch.Generator().manual_seed(1))
    weight = torch.cat([torch.zeros(TEXT), 0.5 * gate.flatten()]).double()[:, None]
    mean, plain = drawn().v.mean(2, keepdim=True), served(drawn())
    out = served(drawn(), Fork(Uniform(), gate=gate, strength=Ramp(0.5, 1, start=0.5)))
    assert apart(out, (1 - weight) * plain + weight * mean) < 1e-14
    assert apart(served(drawn(), Fork(Fixed(2.0), gate=gate, merge="add", strength=0.5)), plain + 2 * weight) < 1e-14
    assert torch.equal(served(drawn(dtype=torch.bfloat16), Fork(Identity())), drawn(dtype=torch.bfloat16).v)


def test_the_output_the_model_made_is_not_written_into():
    call, plan = drawn(), Plan([Fork(Uniform())], STEPS, 4)
    given = served(drawn())
    made = given.clone()
    assert not torch.equal(after_attention(call, plan, given), made)
    assert torch.equal(given, made)


def test_an_edited_variant_sees_what_other_edits_left():
    """The plan tempers q and hides padding; the variant also takes the other entry's keys and values."""
    edits = (Temper(1.5), Bias(-math.inf, padding()))
    base = whole(drawn()).logits.mul(1.5).index_fill(-1, torch.tensor([4]), -math.inf)
    other = whole(drawn(), k=1, v=1)
    moved = other.logits.mul(1.5).index_fill(-1, torch.tensor([4]), -math.inf)
    fork = Fork(Edited(Transfer("kv", 1)), strength=0.25, where=FIRST)
    expected = 0.75 * base.softmax(-1) @ drawn().v[0] + 0.25 * moved.softmax(-1) @ other.v
    assert apart(served(drawn(), *edits, fork)[0], expected) < 1e-6
    fresh = Fork(Edited(Transfer("kv", 1), fresh=True), strength=0.25, where=FIRST)
    expected = 0.75 * base.softmax(-1) @ drawn().v[0] + 0.25 * other.out
    assert apart(served(drawn(), *edits, fresh)[0], expected) < 1e-6


def test_the_edits_of_a_variant_do_not_reach_the_call():
    call = drawn()
    served(call, Fork(Edited(Transfer("qkv", 1), Bias(1.0, text())), gate=mask((0, 0, 0)), where=FIRST))
    assert torch.equal(call.q, call.own["q"])
    assert torch.equal(call.k, call.own["k"])
    assert not call.changes


def test_edits_of_a_variant_keep_their_own_addresses():
    """The first edit is of another head, the second of later steps, the third of another prompt."""
    other = Where(branches=Which(prompt=5))
    edits = (
        Temper(3.0, where=Where(heads=1)),
        Temper(9.0, where=Where(steps=slice(5, None))),
        Temper(2.0, where=other),
    )
    out, plain = served(drawn(), Fork(Edited(*edits))), served(drawn())
    assert apart(out[:, 0], plain[:, 0]) < 1e-14
    assert apart(out[0, 1], (whole(drawn()).logits[1] * 3).softmax(-1) @ drawn().v[0, 1]) < 1e-13
    out = served(drawn(step=6), Fork(Edited(*edits)))
    assert apart(out[0, 1], (whole(drawn()).logits[1] * 27).softmax(-1) @ drawn().v[0, 1]) < 1e-13


def test_where_no_edit_of_a_variant_applies_nothing_is_computed(monkeypatch):
    pairs = counted(monkeypatch)
    edits = Temper(9.0, where=Where(steps=5)), Transfer("kv", 1, target=0)
    fork = Fork(Edited(*edits), where=Where(branches=Which(prompt=1)))
    assert torch.equal(served(drawn(), fork), served(drawn()))
    assert not pairs


def test_only_the_gated_rows_and_heads_are_attended(monkeypatch):
    pairs = counted(monkeypatch)
    served(drawn(), Fork(Edited(Temper(2.0)), gate=mask((0, 0, 0), (1, 1, 1)), where=Where(heads=2)))
    assert pairs == [2 * 29, 2 * 29]
    pairs.clear()
    served(drawn(), Fork(Identity(), strength=0.5), Scale("o", 2.0))
    served(drawn(), Fork(Uniform()))
    assert not pairs


def test_the_keys_of_both_share_one_softmax_when_merged_by_lse():
    call, other = drawn(), whole(drawn(), k=1, v=1)
    both = torch.cat([whole(call).logits, other.logits], -1).softmax(-1)
    expected = both @ torch.cat([call.v[0], call.v[1]], 1)
    out = served(call, Fork(Edited(Transfer("kv", 1)), merge="lse", where=FIRST))
    assert apart(out[0], expected) < 1e-14
    changed = torch.cat([whole(call).logits + torch.log(torch.tensor(3.0)), other.logits], -1).softmax(-1)
    fork = Fork(Edited(Transfer("kv", 1), fresh=True), merge="lse", where=FIRST)
    out = served(drawn(), Bias(math.log(3.0)), fork)
    assert apart(out[0], changed @ torch.cat([call.v[0], call.v[1]], 1)) < 1e-6


def test_every_variant_gives_the_lse_of_its_keys():
    """Merged by lse, each is a further set of keys: the own token, all at logit 0, the best, or one given."""
    call, heads = drawn(), slice(None)
    logits, v = whole(call).logits, call.v[0]
    own, top = logits.diagonal(dim1=1, dim2=2), logits.max(-1)
    for variant, out, lse in (
        (Identity(raised=0.5), v, own + 0.5),
        (Uniform(), v.mean(1, keepdim=True), torch.tensor(29.0).log()),
        (Sharpest(), torch.stack([v[h, top.indices[h]] for h in range(3)]), top.values),
        (Fixed(0.25, logit=-1.0), torch.tensor(0.25), torch.tensor(-1.0)),
    ):
        made = variant.attend(call, 0, heads, slice(None))
        assert isinstance(made, State)
        assert apart(made.out, out.expand(3, 29, 8)) < 1e-14
        assert apart(made.lse, lse.expand(3, 29)) < 1e-6
    plain = served(drawn())
    share = torch.sigmoid(0.7 - logits.logsumexp(-1))[..., None]
    out = served(drawn(), Fork(MeanOf(logit=0.7), merge="lse"))
    assert apart(out[0], (1 - share) * plain[0] + share * plain[0].mean(1, keepdim=True)) < 1e-14


def test_a_row_beside_itself_is_counted_once():
    """Text rows see the text, themselves among it; padding and video rows see the text and themselves."""
    logits, seen = whole(drawn()).logits, torch.eye(29, dtype=torch.bool)
    seen[:, :4] = True
    expected = logits.masked_fill(~seen, -math.inf).softmax(-1) @ drawn().v[0]
    assert apart(served(drawn(), Fork(Identity(beside=text())))[0], expected) < 1e-14


def test_hidden_text_is_not_attended():
    """What Uniform, Sharpest, Within and an edited variant give equals the whole matrix without the hidden keys."""
    call = hidden(scale=0.5)
    for entry, seen in enumerate(call.visible):
        logits, v = whole(call, entry, entry, entry).logits, call.v[entry]
        rows = torch.arange(29) < GRID.size
        within = logits.softmax(-1)
        mass = within[..., :24].sum(-1, keepdim=True)
        spread = mass * v + within[..., 24:] @ v[:, 24:]
        best = torch.stack([v[h, logits.argmax(-1)[h]] for h in range(3)])
        beside = logits.masked_fill(rows & ~torch.eye(29, dtype=bool), -math.inf).softmax(-1) @ v
        for variant, expected in (
            (Uniform(), v[:, :seen].mean(1, keepdim=True).expand_as(v)),
            (Sharpest(), best),
            (Within(Identity(), video()), spread),
            (Identity(beside=~video()), beside),
            (Edited(Temper(2.0)), (2 * logits).softmax(-1) @ v),
        ):
            out = served(hidden(), Fork(variant, rows=video()))[entry]
            assert apart(out[:, :24], expected[:, :24]) < 1e-13


def test_a_mean_of_all_rows_leaves_hidden_rows_out():
    plain = served(hidden())
    out = served(hidden(), Fork(MeanOf()))
    assert apart(out[0], plain[0, :, :26].mean(1, keepdim=True).expand(3, 29, 8)) < 1e-14


def test_the_sharpest_key_is_found_in_parts(monkeypatch):
    monkeypatch.setattr("control.closed_form._CHUNK_BYTES", 4 * 3 * 29 * 5)  # 5 rows at a time
    logits, v = whole(drawn()).logits, drawn().v[0]
    best = torch.stack([v[h, logits.argmax(-1)[h]] for h in range(3)])
    assert torch.equal(served(drawn(), Fork(Sharpest()))[0], best)


def test_closed_forms_refuse_weights_that_other_edits_changed():
    for variant in (Identity(beside=text()), Within(Uniform(), video()), Sharpest()):
        with pytest.raises(PlanError, match="whose weights no other edit changes. Got changed weights"):
            served(drawn(), Bias(1.0, text()), Fork(variant))
    assert torch.equal(served(drawn(), Bias(1.0, text()), Fork(Identity())), drawn().v)


def test_the_identity_needs_rows_that_are_columns():
    call = drawn()
    text_keys = {name: getattr(call, name)[:, :, :TEXT] for name in "kv"}
    cross = drawn(site=Site(0, 0, 0, kind="cross"), q=call.q[:, :, TEXT:], **text_keys)
    with pytest.raises(PlanError, match="reads double, joint, self, single attention"):
        served(cross, Fork(Identity()))
    assert apart(served(cross, Fork(Uniform())), cross.v.mean(2, keepdim=True).expand(cross.q.shape)) < 1e-14
    assert apart(served(cross, Fork(Uniform(words("cat")))), cross.v[:, :, 2:3].expand(cross.q.shape)) < 1e-14


def test_forks_of_the_same_rows_clash():
    one, other = Fork(Uniform(), rows=frames(0, 2)), Fork(Identity(), rows=frames(1))
    with pytest.raises(PlanError, match=r"Got Fork\(Uniform\) and Fork\(Identity\)"):
        served(drawn(), one, other)
    apart_ones = served(drawn(), one, Fork(Identity(), rows=frames(2)))
    assert torch.equal(apart_ones[:, :, TEXT + 16 :], drawn().v[:, :, TEXT + 16 :])


def test_what_does_not_fit_is_refused():
    for wrong, said in (
        (lambda: Edited(), "edits of q, k, v or the weights. Got none"),
        (lambda: Edited(Scale("o", 2.0)), "edits of q, k, v or the weights. Got Scale"),
        (lambda: Fork(Uniform(), merge="mean"), "by blend, lse or add. Got 'mean'"),
        (lambda: served(drawn(), Fork(Uniform(tokens(mask().bool().numpy())))), "Uniform attention must have keys"),
        (lambda: served(drawn(), Fork(MeanOf(frames(0) & frames(1)))), "A mean must have rows"),
    ):
        with pytest.raises(UsageError, match=said):
            wrong()


def test_the_cost_is_told():
    layout = drawn().layout
    plan = lambda *edits: Plan(edits, STEPS, 4).cost(layout)  # noqa: E731
    assert plan(Fork(Uniform())) == plan(Fork(Identity())) == 0
    assert plan(Fork(Edited(Temper(2.0)), where=Where(layers=slice(0, 2)))) == 0.5
    assert plan(Fork(Edited(Temper(2.0)), merge="lse")) == 2
    assert plan(Fork(Identity(beside=text()))) == TEXT / 29


def test_through_a_pipeline_it_equals_an_independent_patch():
    """In both halves of guidance, at the second of three layers: a soft blend with other keys."""
    pipe = tiny.pipeline()
    fork = Fork(Edited(Scale("k", -30.0, rows=video())), gate=video(), strength=0.5, where=Where(layers=1))
    ours = tiny.latents(probe.trace(pipe, fork), steps=2)
    calls = JointCalls(3, tiny.TEXT + 48)

    def patched(plain, q, k, v, **rest):
        at = calls.next(q)
        out = plain(q, k, v, **rest)
        if at is None or at[1] != 1:
            return out
        turned = torch.cat([k[:, :, : tiny.TEXT], -30 * k[:, :, tiny.TEXT :]], 2)
        out = out.clone()
        out[:, :, tiny.TEXT :] = 0.5 * (out + plain(q, turned, v, **rest))[:, :, tiny.TEXT :]
        return out

    with patched_attention(patched):
        theirs = tiny.latents(pipe, steps=2)
    assert apart(ours, theirs) < 1e-5
    assert apart(ours, tiny.latents(pipe, steps=2)) > 1e-3


@pytest.mark.filterwarnings("ignore:In CPU autocast")  # Mochi's own, on every CPU
@pytest.mark.parametrize("family", ["cogvideox", "mochi"])
def test_a_variant_takes_from_another_prompt_of_the_step(family):
    """In one call, or in an earlier one: at full strength it equals the transfer itself, on the conditional half."""
    bench = bench_of(Case(family))
    prompts = [tiny.PROMPT, tiny.OTHER]
    where = Where(layers=0, branches=Which(guided=True))
    plain = bench.latents(prompt=prompts)
    direct = bench.latents(Transfer("kv", 0, target=1, rows=video(), where=where), prompt=prompts)
    forked = bench.latents(Fork(Edited(Transfer("kv", 0, target=1, rows=video(), where=where))), prompt=prompts)
    assert apart(forked, direct) < 1e-5
    assert apart(direct, plain) > 1e-4
    assert torch.equal(forked[0], plain[0])


def test_an_edit_of_the_output_is_no_variant():
    for late in (Reuse(Window(frames=1)), Scale("o", 2.0)):
        with pytest.raises(UsageError, match="must be made of edits of q, k, v or the weights"):
            Edited(late)


def test_a_variant_whose_edits_are_elsewhere_is_no_silent_nothing():
    for inner, said in ((Where(steps=1), "met none"), (Where(steps=0), None)):
        fork = Fork(Edited(Temper(2.0, where=inner)), where=Where(steps=0))
        plan = Plan([fork], STEPS, 4, drawn().prompts)
        call = drawn()
        after_attention(call, plan, whole(call).out[None].expand(2, -1, -1, -1).clone())
        if said is None:
            plan.refuse_unmet()
            continue
        with pytest.raises(PlanError, match=said):
            plan.refuse_unmet()


def test_a_fork_of_no_strength_is_met():
    plan = Plan([Fork(Edited(Temper(2.0)), strength=0.0)], STEPS, 4, drawn().prompts)
    call = drawn()
    after_attention(call, plan, whole(call).out[None].expand(2, -1, -1, -1).clone())
    plan.refuse_unmet()
