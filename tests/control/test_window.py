"""Windows against the whole matrix: each pair of tokens asked one by one."""

from __future__ import annotations

import math

import pytest
import torch

from control import weighting
from control.window import Band, Window
from probe import KeptMass
from probe.errors import UsageError
from probe.layout import Grid
from probe.readout.kept import FrameWindow
from probe.region import frames
from probe.site import Where
from tests.control.whole import attended, double_call, output, position, served
from tests.probe.readout.calls import JOINT, SELF, value_of

GRID = Grid(4, 4, 5)
TIGHT = {"atol": 1e-6, "rtol": 1e-6}
WINDOWS = {
    Window(frames=0): lambda f, y, x: f == 0,
    Window(frames=1): lambda f, y, x: abs(f) <= 1,
    Window(radius=2): lambda f, y, x: y * y + x * x < 4,
    Window(radius=2.5): lambda f, y, x: y * y + x * x < 6.25,
    Window(radius=2, shape="square"): lambda f, y, x: max(abs(y), abs(x)) < 2,
    Window(frames=1, radius=1.5): lambda f, y, x: abs(f) <= 1 and y * y + x * x < 2.25,
    Window(frames=2, radius=2, shape="square"): lambda f, y, x: abs(f) <= 2 and max(abs(y), abs(x)) < 2,
}


def hidden(call, sees, value=-math.inf):
    """A bias [N, M] on the pairs of video tokens that do not see each other, by their places a and b."""
    places = [position(call, side) for side in ("rows", "columns")]
    rows = [[a is None or b is None or sees(a, b) for b in places[1]] for a in places[0]]
    return torch.where(torch.tensor(rows), 0.0, value).double()


@pytest.mark.parametrize("settings", JOINT + SELF, ids=str)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_a_window_equals_the_matrix(settings, window):
    near = WINDOWS[window]
    settings = settings | ({"visible": 84} if "visible" in settings else {})
    call = double_call(grid=GRID, **settings)
    bias = hidden(call, lambda a, b: near(*(i - j for i, j in zip(a, b, strict=True))))
    torch.testing.assert_close(output(call, window), attended(call, bias), **TIGHT)
    assert bias.isinf().any()


@pytest.mark.parametrize("edit", [Window(frames=1, radius=2), Band(1.2, "temporal", first_frame=True)], ids=str)
def test_a_mask_equals_the_table(edit, monkeypatch):
    monkeypatch.setattr(weighting, "MOST_GROUPS", 100)
    table = output(double_call(grid=GRID), edit)
    for few, some in ((6, 100), (6, 6)):
        monkeypatch.setattr(weighting, "MOST_GROUPS", few)
        monkeypatch.setattr(weighting, "MOST_LOOKED_UP", some)
        edit.end()
        torch.testing.assert_close(output(double_call(grid=GRID), edit), table, **TIGHT)


@pytest.mark.parametrize("strength", [0.25, 1.0])
def test_a_softer_window_takes_odds_from_the_keys_outside(strength):
    call = double_call(grid=GRID)
    bias = hidden(call, lambda a, b: a[0] == b[0], math.log(1 - strength) if strength < 1 else -math.inf)
    torch.testing.assert_close(output(call, Window(frames=0, strength=strength)), attended(call, bias), **TIGHT)


def test_the_first_frame_stays_and_other_rows_are_left_alone():
    call = double_call(grid=GRID)
    bias = hidden(call, lambda a, b: a[0] != 2 or b[0] in (0, 2))
    edit = Window(frames=0, first_frame=True, rows=frames(2))
    torch.testing.assert_close(output(call, edit), attended(call, bias), **TIGHT)


@pytest.mark.parametrize("settings", JOINT[:2] + SELF, ids=str)
@pytest.mark.parametrize("order", ["spatial", "temporal"])
@pytest.mark.parametrize("block", [1, 7])
@pytest.mark.parametrize("first", [False, True])
def test_a_band_equals_the_matrix(settings, order, block, first):
    call = double_call(grid=GRID, **settings)

    def number(place):
        f, y, x = place
        return (f * 20 + y * 5 + x if order == "spatial" else (y * 5 + x) * 4 + f) // block

    bias = hidden(call, lambda a, b: abs(number(a) - number(b)) < 1.5 * 20 / block or (first and b[0] == 0))
    torch.testing.assert_close(output(call, Band(1.5, order, block, first_frame=first)), attended(call, bias), **TIGHT)


def test_the_bands_follow_frames_and_places():
    """A spatial band within a frame and a half reaches the next frame; a temporal one keeps a token's own place."""
    grid = Grid(13, 3, 4)
    reach = {}
    for order in ("spatial", "temporal"):
        call = double_call(grid=grid, text=0, kind="self")
        served(call, Band(0.9, order))
        (change,) = call.changes
        reach[order] = (change.of(slice(0, 156)) == 0).view(13, 12, 13, 12)
    own = torch.arange(12)
    assert not reach["spatial"][:, own, :, own][:, 0, 1:].any()
    assert reach["temporal"][3, 5, :, 5].sum() >= 11


def test_a_frame_window_keeps_what_kept_mass_says():
    """Kept mass m of the plain attention: hidden pairs have the share 1 - m of a row."""
    call = double_call(grid=GRID, text=0, kind="self")
    mass = value_of(KeptMass(FrameWindow(1)), call)["mean"]
    plain = (call.q[0] @ call.k[0].mT * 0.25).logsumexp(-1)
    served(call, Window(frames=1))
    kept = (call.lse()[0] - plain).exp().mean(-1)
    torch.testing.assert_close(torch.as_tensor(mass).double(), kept, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "window",
    [Window(frames=3), Window(radius=9), Window(radius=9, shape="square"), Band(4.0), Window(frames=0, strength=0.0)],
    ids=str,
)
def test_a_window_that_holds_everything_asks_for_nothing(window):
    assert not served(double_call(grid=GRID), window).changes


def test_a_window_of_some_heads():
    call = double_call(grid=GRID)
    bias = torch.stack([hidden(call, lambda a, b: True), hidden(call, lambda a, b: a[0] == b[0])])
    torch.testing.assert_close(output(call, Window(frames=0, where=Where(heads=1))), attended(call, bias), **TIGHT)


def test_what_a_window_must_be():
    for settings in ({}, {"frames": -1}, {"radius": 0}, {"radius": 2, "shape": "diamond"}):
        with pytest.raises(UsageError, match="A window must have frames of 0 or more, or a radius above 0"):
            Window(**settings)
    for settings in ({"width": 0}, {"block": 0}, {"order": "sideways"}):
        with pytest.raises(UsageError, match="A band must have a width above 0"):
            Band(**settings)
    with pytest.raises(UsageError, match="strength of a window must lie in 0 to 1. Got 1.5"):
        served(double_call(), Window(frames=0, strength=1.5))
