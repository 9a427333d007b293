"""Reweighting in its three meanings, against the probabilities of the whole matrix."""

from __future__ import annotations

import math

import pytest
import torch

from control.bias import Bias
from control.reweight import Reweight
from control.strength import Ramp
from probe.errors import PlanError, UsageError
from probe.region import frames, padding, text, video, words
from probe.site import Branch, Where
from tests.control.whole import batch, double_call, inside, logits, output, served, values
from tests.probe.readout.calls import CROSS, JOINT

TIGHT = {"atol": 1e-6, "rtol": 1e-6}


def probabilities(call):
    """[H, N, M] of the video rows, and the other rows as they are."""
    p = logits(call).softmax(-1)
    return p, inside(call, "rows", ("video", None))


@pytest.mark.parametrize("settings", JOINT, ids=str)
@pytest.mark.parametrize("factor", [-5.0, 0.0, 0.4, 3.0])
def test_raw_reweighting_leaves_the_rest(settings, factor):
    call = double_call(**settings)
    p, rows = probabilities(call)
    p[:, rows[:, None] & inside(call, "columns", ("video", 1))] *= factor
    got = output(call, Reweight(frames(1), factor))
    torch.testing.assert_close(got, p @ values(call), **TIGHT)


@pytest.mark.parametrize("settings", JOINT, ids=str)
@pytest.mark.parametrize("factor", [0.0, 0.4, 3.0])
def test_renormalised_reweighting_keeps_the_sum(settings, factor):
    call = double_call(**settings)
    p, rows = probabilities(call)
    p[:, rows[:, None] & inside(call, "columns", ("video", 1))] *= factor
    p = p / p.sum(-1, keepdim=True)
    got = output(call, Reweight(frames(1), factor, "renormalised"))
    torch.testing.assert_close(got, p @ values(call), **TIGHT)
    bias = Bias(math.log(factor) if factor else -math.inf, frames(1), rows=video())
    torch.testing.assert_close(got, output(double_call(**settings), bias), **TIGHT)


def moved(p, rows, source, target, keep):
    """Row by row."""
    new = p.clone()
    for head in range(len(p)):
        for row in rows.nonzero().flatten():
            line = p[head, row]
            freed, there = (1 - keep) * line[source].sum(), line[target].sum()
            new[head, row, source] = keep * line[source]
            new[head, row, target] += freed * line[target] / there
    return new


@pytest.mark.parametrize("settings", JOINT, ids=str)
@pytest.mark.parametrize("keep", [0.6, 0.0])
def test_redistributed_mass_goes_to_the_other_video_columns(settings, keep):
    call = double_call(**settings)
    p, rows = probabilities(call)
    source = inside(call, "columns", ("video", 1), ("text", None))
    target = inside(call, "columns", ("video", 0), ("video", 2))
    new = moved(p, rows, source, target, keep)
    got = output(call, Reweight(frames(1) | text(), keep, "redistributed"))
    torch.testing.assert_close(got, new @ values(call), **TIGHT)
    torch.testing.assert_close(new.sum(-1), torch.ones_like(new[..., 0]))


def test_redistributed_mass_goes_where_it_is_told():
    call = double_call()
    p, rows = probabilities(call)
    source, target = inside(call, "columns", ("video", 1)), inside(call, "columns", ("text", None))
    got = output(call, Reweight(frames(1), 0.2, "redistributed", to=text() | frames(1)))
    torch.testing.assert_close(got, moved(p, rows, source, target, 0.2) @ values(call), **TIGHT)


@pytest.mark.parametrize("settings", CROSS, ids=str)
def test_a_word_in_cross_attention_as_in_prompt_to_prompt(settings):
    call = double_call(**settings)
    p = logits(call).softmax(-1)
    p[..., 2] *= 3.0  # "a red cat"
    torch.testing.assert_close(output(call, Reweight(words("cat"), 3.0)), p @ values(call), **TIGHT)


def test_rows_and_heads_are_chosen():
    call = double_call()
    p = logits(call).softmax(-1)
    p[1][inside(call, "rows", ("text", None))[:, None] & inside(call, "columns", ("video", None))] *= 2
    edit = Reweight(video(), 2.0, rows=text(), where=Where(heads={1}))
    torch.testing.assert_close(output(call, edit), p @ values(call), **TIGHT)


@pytest.mark.parametrize("mode", ["raw", "renormalised", "redistributed"])
def test_the_strength_takes_the_factor_from_one(mode):
    edit = Reweight(frames(1), 0.5, mode, strength=Ramp(0, 1))
    half = output(double_call(), Reweight(frames(1), 0.75, mode))
    torch.testing.assert_close(output(double_call(), edit, step=5), half, **TIGHT)
    assert not served(double_call(), edit, step=0).changes


@pytest.mark.parametrize("mode", ["raw", "renormalised", "redistributed"])
def test_what_changes_nothing_asks_for_nothing(mode):
    for edit in (Reweight(frames(1), 1.0, mode), Reweight(video() & text(), 0.5, mode)):
        assert not served(double_call(), edit).changes
    assert not served(double_call(), Reweight(video(), 0.5, "redistributed", to=frames(1))).changes
    blank = batch([Branch(guided=False)])
    assert not served(blank, Reweight(words("red"), 0.5, mode)).changes
    assert not served(double_call(kind="self"), Reweight(words("red"), 0.5, mode)).changes


def test_factors_that_do_not_fit_their_mode():
    with pytest.raises(UsageError, match="renormalised factor must be 0 or more. Got -5.*mode raw"):
        Reweight(video(), -5.0, "renormalised")
    with pytest.raises(UsageError, match="redistributed factor must lie in 0 to 1. Got 1.5"):
        Reweight(video(), 1.5, "redistributed")
    for value in (math.nan, math.inf):
        with pytest.raises(UsageError, match="raw factor must be a number"):
            Reweight(video(), value)
    with pytest.raises(UsageError, match="mode must be raw, renormalised or redistributed. Got 'soft'"):
        Reweight(video(), 1.5, "soft")
    with pytest.raises(UsageError, match="Only redistributed mass goes to other columns"):
        Reweight(video(), 1.5, to=text())
    with pytest.raises(UsageError, match="renormalised factor must be 0 or more. Got -1"):
        served(double_call(), Reweight(frames(0), 0.0, "renormalised", strength=2.0))
    with pytest.raises(PlanError, match=r"at least one key. Got Reweight\(.* x 0, renormalised\)"):
        served(double_call(), Reweight(video() | text() | padding(), 0.0, "renormalised"))
