"""Sinks found in a call, against the columns of the whole matrix, and used by edits."""

from __future__ import annotations

import pytest
import torch

from control.bias import Bias
from control.reweight import Reweight
from control.sink import Sinks
from probe.errors import UsageError
from probe.region import frames, video
from probe.site import Where
from tests.control.whole import attended, double_call, inside, logits, output, served, values
from tests.probe.readout.calls import CROSS, JOINT, SELF


def enriched(call, heads=(0, 1)):
    """N times the mean of p over the video rows and some heads, for each column."""
    p = logits(call).softmax(-1)[list(heads)]
    return p[:, inside(call, "rows", ("video", None))].mean((0, 1)) * p.shape[-1]


@pytest.mark.parametrize("settings", JOINT + SELF + CROSS, ids=str)
@pytest.mark.parametrize("tokens", ["video", "text", "all"])
@pytest.mark.parametrize("heads", [None, 1])
def test_sinks_are_the_columns_over_the_threshold(settings, tokens, heads):
    call = double_call(sharp=4.0, **settings)
    found = Sinks(1.5, tokens, heads).inside(call, 0, "columns")
    share = enriched(call, (0, 1) if heads is None else (heads,))
    on_video = inside(call, "columns", ("video", None))
    counted = {"video": on_video, "text": ~on_video, "all": torch.ones_like(on_video)}[tokens]
    assert found[: len(share)].tolist() == ((share > 1.5) & counted).tolist()
    assert len(found) == call.columns.total
    assert not found[len(share) :].any()
    if tokens == "all":
        assert 0 < found.sum() < len(share) / 2


def test_sinks_follow_the_keys_of_each_call():
    calls = [double_call(sharp=4.0, seed=seed) for seed in (0, 1)]
    edit = Bias(-1.0, Sinks(1.5, "all"))
    for call in calls:
        bias = torch.where(enriched(call) > 1.5, -1.0, 0.0).double().expand(31, 31)
        torch.testing.assert_close(output(call, edit), attended(call, bias), atol=1e-6, rtol=1e-6)
    assert not torch.equal(enriched(calls[0]) > 1.5, enriched(calls[1]) > 1.5)


def test_mass_of_sinks_goes_to_the_other_video_columns():
    """VAR: p = 0.6, for one head by the sinks of this head."""
    call = double_call(sharp=4.0)
    p, sinks = logits(call).softmax(-1), (enriched(call, (1,)) > 1.5) & inside(call, "columns", ("video", None))
    others = inside(call, "columns", ("video", None)) & ~sinks
    for row in inside(call, "rows", ("video", None)).nonzero().flatten():
        line = p[1, row].clone()
        p[1, row, sinks] = 0.6 * line[sinks]
        p[1, row, others] += 0.4 * line[sinks].sum() * line[others] / line[others].sum()
    edit = Reweight(Sinks(1.5, heads=1), 0.6, "redistributed", where=Where(heads=1))
    assert sinks.any()
    torch.testing.assert_close(output(call, edit), p @ values(call), atol=1e-6, rtol=1e-6)


def test_sinks_as_rows_are_the_same_tokens():
    call = double_call(sharp=4.0)
    area = Sinks(1.5, "all")
    assert torch.equal(area.inside(call, 0, "rows"), area.inside(call, 0, "columns"))
    cross = double_call(kind="cross", sharp=4.0)
    assert area.inside(cross, 0, "columns").any()
    assert not area.inside(cross, 0, "rows").any()
    rest = (~Sinks(1.5)).inside(call, 0, "columns")
    assert torch.equal(rest, inside(call, "columns", ("video", None)) & ~Sinks(1.5).inside(call, 0, "columns"))


@pytest.mark.parametrize("mode", ["raw", "renormalised", "redistributed"])
def test_changes_of_weights_do_not_count(mode):
    """Whatever merges came before."""
    call = double_call(sharp=4.0)
    sinks = Sinks(1.5).inside(call, 0, "columns")
    served(call, Reweight(frames(0), 0.0, mode))
    found = [Sinks(1.5).inside(call, 0, "columns")]
    call.writable("out")
    found.append(Sinks(1.5).inside(call, 0, "columns"))
    assert torch.equal(found[0], sinks)
    assert torch.equal(found[1], sinks)
    assert sinks[inside(call, "columns", ("video", 0))].any()


def test_no_sinks_ask_for_nothing():
    edit = Reweight(Sinks(31.0, "all"), 0.5, "renormalised", rows=video())
    assert not served(double_call(), edit).changes


def test_what_sinks_must_be():
    with pytest.raises(UsageError, match="threshold of 1 or more.*Got 0.5"):
        Sinks(0.5)
    with pytest.raises(UsageError, match="Got 10.0 and 'padding'"):
        Sinks(tokens="padding")
