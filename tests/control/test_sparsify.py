"""Rows that keep their largest weights, against a sort of the whole matrix."""

from __future__ import annotations

import math

import pytest
import torch

from control.sparsify import Sparsify
from control.strength import Ramp
from probe.errors import UsageError
from probe.region import video
from probe.site import Where
from tests.control.whole import double_call, inside, logits, output, served, values
from tests.probe.readout.calls import CROSS, JOINT, SELF

TIGHT = {"atol": 1e-9, "rtol": 1e-9}


def strongest(p, keep, renormalise=True, softly=0.0):
    """Row by row: all but the first of the sorted weights times `softly`."""
    new = p.clone()
    for line in new.view(-1, p.shape[-1]):
        order = sorted(range(len(line)), key=lambda j: -line[j])
        for j in order[keep:]:
            line[j] *= softly
        if renormalise:
            line /= line.sum()
    return new


@pytest.mark.parametrize("settings", [*JOINT, *SELF, *CROSS], ids=str)
@pytest.mark.parametrize("renormalise", [True, False])
def test_each_row_keeps_its_largest_weights(settings, renormalise):
    call = double_call(**settings)
    p = logits(call).softmax(-1)
    count = math.ceil(0.3 * p.shape[-1])
    assert count < 0.3 * p.shape[-1] + 1
    got = output(call, Sparsify(0.3, renormalise=renormalise))
    torch.testing.assert_close(got, strongest(p, count, renormalise) @ values(call), **TIGHT)


def test_a_whole_number_of_keys_is_not_rounded_up():
    call = double_call(kind="cross", text=10)  # 0.7 * 10 is 7.000000000000001 when added up
    p = logits(call).softmax(-1)
    got = output(call, Sparsify(0.1 * 3 + 0.4))
    torch.testing.assert_close(got, strongest(p, 7) @ values(call), **TIGHT)


def test_rows_and_heads_are_chosen(monkeypatch):
    """The explicit weights come 5 rows at a time."""
    call = double_call()
    monkeypatch.setattr("probe.weigh_rows._CHUNK_BYTES", 8 * 31 * 5)
    p = logits(call).softmax(-1)
    rows = inside(call, "rows", ("video", None))
    p[1, rows] = strongest(p[1, rows], math.ceil(0.25 * 31))
    got = output(call, Sparsify(0.25, rows=video(), where=Where(heads={1})))
    torch.testing.assert_close(got, p @ values(call), **TIGHT)


def test_the_strength_hides_softly():
    call = double_call()
    p = logits(call).softmax(-1)
    got = output(call, Sparsify(0.5, strength=Ramp(0, 1)), step=5)
    torch.testing.assert_close(got, strongest(p, 16, softly=0.5) @ values(call), **TIGHT)


def test_equal_weights_stay_together():
    call = double_call(kind="self")
    call.q.zero_()
    got = output(call, Sparsify(0.1))
    torch.testing.assert_close(got, values(call).mean(1, keepdim=True).expand_as(got), **TIGHT)


def test_what_changes_nothing_asks_for_nothing():
    assert not served(double_call(), Sparsify(1.0)).changes
    assert not served(double_call(), Sparsify(0.5, strength=0.0)).changes


def test_shares_and_strengths_that_are_none():
    for share in (0.0, -0.1, 1.1, math.nan):
        with pytest.raises(UsageError, match="share of weights to keep must lie above 0 and up to 1. Got"):
            Sparsify(share)
    with pytest.raises(UsageError, match=r"strength of Sparsify\(keep 0.5\) must lie in 0 to 1. Got 2"):
        served(double_call(), Sparsify(0.5, strength=2.0))
