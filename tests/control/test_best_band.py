"""Each head takes the band that gives its output back, against the whole matrix."""

from __future__ import annotations

import math

import pytest
import torch

from control.best_band import BestBand
from control.window import Band
from probe.errors import UsageError
from probe.region import frames
from probe.site import Where
from tests.control.whole import attended, double_call, inside, output, position, served
from tests.probe.readout.calls import JOINT, SELF

WIDTH = 0.6
TIGHT = {"atol": 1e-9, "rtol": 1e-9}


def mask(call, order):
    """bias [N, M]: |i - j| < WIDTH frames when the tokens are counted frame by frame, or place by place."""
    rows, columns = position(call, "rows"), position(call, "columns")
    grid = call.layout.grid

    def number(f, y, x):
        place = y * grid.width + x
        return f * grid.patches + place if order == "spatial" else place * grid.frames + f

    bias = torch.zeros(len(rows), len(columns), dtype=torch.float64)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            if row and column and abs(number(*row) - number(*column)) >= WIDTH * grid.patches:
                bias[i, j] = -math.inf
    return bias


def both(call):
    """Outputs [2, H, N, D] with each band, and their squared errors [2, H] over all video rows."""
    video = torch.tensor([place is not None for place in position(call, "rows")])
    full = attended(call, torch.zeros(1, 1))
    made = torch.stack([attended(call, mask(call, order)) for order in ("spatial", "temporal")])
    return made, (made - full)[:, :, video].square().sum((-2, -1))


def calls(settings):
    """Calls of six heads; in each some head takes the one band, and some the other."""
    call = double_call(heads=6, **settings)
    made, error = both(call)
    assert 0 < (error[0] <= error[1]).sum() < 6
    return call, made, error


@pytest.mark.parametrize("settings", [*JOINT, *SELF], ids=str)
@pytest.mark.parametrize("worst", [False, True])
def test_each_head_takes_its_own_band(settings, worst):
    call, made, error = calls(settings)
    spatial = (error[0] <= error[1]) != worst
    edit = BestBand(WIDTH, sampled=8, worst=worst)
    got = output(call, edit)
    torch.testing.assert_close(got, torch.where(spatial[:, None, None], made[0], made[1]), **TIGHT)
    assert edit.choices == {(0, 0, 0): spatial.tolist()}


def test_only_its_heads_change_and_a_few_rows_can_choose():
    call, made, _ = calls({})
    edit = BestBand(WIDTH, sampled=2, where=Where(heads=(1, 4)))
    got = output(call, edit)
    plain = attended(call, torch.zeros(1, 1))
    ((chosen),) = edit.choices.values()
    for head in range(6):
        want = plain[head] if head not in (1, 4) else made[0 if chosen[(1, 4).index(head)] else 1][head]
        torch.testing.assert_close(got[head], want, **TIGHT)


def test_a_softer_choice_is_that_of_softer_bands():
    call, _, error = calls({})
    got = output(call, BestBand(WIDTH, strength=0.5))
    soft = [output(calls({})[0], Band(WIDTH, order, strength=0.5)) for order in ("spatial", "temporal")]
    torch.testing.assert_close(got, torch.where((error[0] <= error[1])[:, None, None], *soft), **TIGHT)


def test_rows_are_chosen():
    call, made, error = calls({})
    got = output(call, BestBand(WIDTH, rows=frames(1)))
    rows = inside(call, "rows", ("video", 1))
    want = attended(call, torch.zeros(1, 1))
    want[:, rows] = torch.where((error[0] <= error[1])[:, None, None], made[0], made[1])[:, rows]
    torch.testing.assert_close(got, want, **TIGHT)


def test_strength_zero_asks_for_nothing():
    assert not served(double_call(), BestBand(WIDTH, strength=0.0)).changes


def test_no_sampled_rows_choose_nothing():
    with pytest.raises(UsageError, match="sampled rows of 1 or more. Got 0"):
        BestBand(sampled=0)
    with pytest.raises(UsageError, match="band must have a width above 0"):
        BestBand(0.0)
