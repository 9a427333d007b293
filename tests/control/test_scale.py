"""Scale against the whole matrix in float64, and what it refuses."""

import math

import pytest
import torch

import probe
from control.scale import Scale, Temper, head_router_factors, multipliers
from control.strength import Ramp
from probe.errors import UsageError
from probe.region import frames, padding, text, video, words
from probe.site import Site, Where, Which
from tests import tiny
from tests.control.drawn import GRID, TEXT, apart, drawn, hidden, served, whole
from tests.oracle import JointCalls, patched_attention

FIRST = Where(branches=Which(prompt=0))
VIDEO = torch.arange(TEXT + GRID.size) >= TEXT


def test_factor_one_and_strength_zero_keep_every_bit():
    plain = served(drawn(dtype=torch.bfloat16))
    for edit in (
        Scale("q", 1),
        Scale("v", (1.0, 1.0, 1.0)),
        Scale("k", torch.ones(TEXT + GRID.size)),
        Scale("o", 1.0),
        Scale("o", 3.0, strength=0.0),
        Temper(5.0, strength=Ramp(0, 1, start=0.5)),
    ):
        assert torch.equal(served(drawn(dtype=torch.bfloat16), edit), plain)


def test_each_tensor_is_multiplied_where_it_is_addressed():
    """Head 1, some tokens, the first entry; the strength goes half of the way to the factor."""
    here = Where(heads=1, branches=Which(prompt=0))
    for name in "qkv":
        call = drawn()
        served(call, Scale(name, 3.0, rows=frames(1), strength=0.5, where=here))
        expected = call.own[name].clone()
        expected[0, 1, TEXT + 8 : TEXT + 16] *= 2
        assert torch.equal(getattr(call, name), expected)
    plain = served(drawn())
    expected = plain.clone()
    expected[0, 1, TEXT + 8 : TEXT + 16] *= 2
    assert torch.equal(served(drawn(), Scale("o", 3.0, rows=frames(1), strength=0.5, where=here)), expected)


def test_factors_per_head_and_per_token():
    rng = torch.Generator().manual_seed(3)
    per_token, per_cell, both = (torch.rand(s, generator=rng) for s in ((29,), GRID.shape, (3, 29)))
    for factor, spread in (
        ((2.0, 0.0, -1.0), torch.tensor([2.0, 0.0, -1.0])[:, None].expand(3, 29)),
        (per_token, per_token.expand(3, 29)),
        (per_cell, torch.cat([torch.ones(TEXT), per_cell.flatten()]).expand(3, 29)),
        (both, both),
    ):
        p, v = whole(drawn()).p, whole(drawn()).v
        for name, expected in (("o", (p @ v) * spread[..., None]), ("v", p @ (v * spread[..., None]))):
            assert apart(served(drawn(), Scale(name, factor, where=FIRST))[0], expected) < 1e-13


def test_scaling_one_head_takes_one_factor():
    out = served(drawn(), Scale("o", [0.5], where=Where(heads=2)))
    assert torch.equal(out[:, 2], served(drawn())[:, 2] * 0.5)
    with pytest.raises(UsageError, match="one factor per selected head, 3. Got 2"):
        served(drawn(), Scale("o", [0.5, 1.0]))


def test_scales_of_the_same_tensor_multiply():
    edits = (Scale("v", 2.0, rows=video()), Scale("v", 3.0, rows=frames(0)), Scale("v", (1.0, 1.0, 0.5)))
    factor = torch.ones(3, 29, dtype=torch.float64)
    factor[:, TEXT:] *= 2
    factor[:, TEXT : TEXT + 8] *= 3
    factor[2] *= 0.5
    p, v = whole(drawn()).p, whole(drawn()).v
    for order in (edits, edits[::-1]):
        assert apart(served(drawn(), *order)[0], p @ (v * factor[..., None])) < 1e-13


def test_temper_multiplies_the_logits():
    logits, v = whole(drawn()).logits, whole(drawn()).v
    for sharpness in (0.0, 0.3, 4.0):
        assert apart(served(drawn(), Temper(sharpness))[0], (sharpness * logits).softmax(-1) @ v) < 1e-13
    only_text = (logits * torch.where(VIDEO, 1.0, 2.5)).softmax(-1) @ v
    assert apart(served(drawn(), Scale("k", 2.5, rows=~video()))[0], only_text) < 1e-13


def test_head_multipliers_make_a_head_uniform_or_remove_it():
    out = served(drawn(), *multipliers((0.0, 1.0, 1.0), (1.0, 1.0, 0.0)))
    assert apart(out[:, 0], drawn().v[:, 0].mean(1, keepdim=True).expand(2, 29, 8)) < 1e-13
    assert torch.equal(out[:, 1], served(drawn())[:, 1])
    assert not out[:, 2].any()


def test_uniform_attention_leaves_hidden_text_out():
    out = served(hidden(), Temper(0.0))
    for entry, seen in enumerate((26, 29)):
        mean = hidden().v[entry, :, :seen].mean(1, keepdim=True)
        assert apart(out[entry], mean.expand(3, 29, 8)) < 1e-13


def test_tokens_of_keys_are_told_from_tokens_of_queries():
    """In cross attention the rows are video and the columns text."""
    call = drawn()
    text_keys = {name: getattr(call, name)[:, :, :TEXT] for name in "kv"}
    cross = drawn(site=Site(0, 0, 0, kind="cross"), q=call.q[:, :, TEXT:], **text_keys)
    served(cross, Scale("v", 2.0, rows=words("cat") | padding()), Scale("q", 2.0, rows=frames(2)))
    assert torch.equal(cross.v, cross.own["v"] * torch.tensor([1.0, 1, 2, 1, 2])[:, None])
    assert torch.equal(cross.q[:, :, 16:], cross.own["q"][:, :, 16:] * 2)
    assert torch.equal(cross.q[:, :, :16], cross.own["q"][:, :, :16])


def test_factors_of_the_video_leave_keys_of_text_alone():
    call = drawn()
    keys = {name: getattr(call, name)[:, :, :TEXT] for name in "kv"}
    cross = drawn(site=Site(0, 0, 0, kind="cross"), q=call.q[:, :, TEXT:], **keys)
    served(cross, Scale("k", torch.full((3, 2, 4), 2.0)))
    assert torch.equal(cross.k, call.k[:, :, :TEXT])


def test_half_precision_rounds_the_product_once():
    call = drawn(dtype=torch.bfloat16)
    served(call, Scale("q", torch.full((29,), 1.2345, dtype=torch.float64)))
    assert torch.equal(call.q, (call.own["q"].float() * 1.2345).bfloat16())


def test_through_a_pipeline_it_equals_an_independent_patch():
    pipe, guided = tiny.pipeline(), Which(guided=True)
    flat = Temper(0.5, rows=text(), where=Where(layers=1, branches=guided))
    route = Scale("o", (0.0, 2.0), where=Where(layers=1, steps=1, branches=guided))
    ours = tiny.latents(probe.trace(pipe, flat, route), steps=2)
    calls = JointCalls(3, tiny.TEXT + 48)

    def patched(plain, q, k, v, **rest):
        at = calls.next(q)
        if at is None or at[1] != 1:
            return plain(q, k, v, **rest)
        q = q.clone()
        q[1, :, :6] *= 0.5
        out = plain(q, k, v, **rest)
        if at[0] == 1:
            out = out.clone()
            out[1] *= torch.tensor([0.0, 2.0])[:, None, None]
        return out

    with patched_attention(patched):
        theirs = tiny.latents(pipe, steps=2)
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, tiny.latents(pipe, steps=2))


def test_head_router_factors_are_the_formula():
    factors = head_router_factors([0.9, 0.5, 0.1])
    assert factors == pytest.approx([1 + 0.2 / (1 + math.exp(0.5 - d)) for d in (0.0, 0.5, 1.0)])
    assert head_router_factors([0.4, 0.4], gamma=1, delta=0) == (1.5, 1.5)
    out = served(drawn(), Scale("o", factors))
    assert apart(out, served(drawn()) * torch.tensor(factors, dtype=torch.float64)[:, None, None]) < 1e-13
    with pytest.raises(UsageError, match="one per head in -1 to 1. Got \\[\\]"):
        head_router_factors([])


def test_what_does_not_fit_is_refused():
    with pytest.raises(UsageError, match="one tensor of q, k, v, o. Got 'kv'"):
        Scale("kv", 2.0)
    with pytest.raises(UsageError, match="of shape \\(29,\\), \\(3, 2, 4\\) or \\(3, 29\\). Got \\(3, 3\\)"):
        served(drawn(), Scale("q", torch.ones(3, 3)))
