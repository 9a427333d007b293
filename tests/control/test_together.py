"""Edits that are right alone and meet at one call: what together has no meaning is refused, and nothing is NaN."""

from __future__ import annotations

import math

import pytest
import torch

from control.bias import Bias
from control.perturb import MaskRegion
from control.sparsify import Sparsify
from control.transfer import Transfer
from control.window import Window
from probe.errors import PlanError, UsageError
from probe.layout import TokenLayout
from probe.region import box, frames, video, words
from probe.site import Branch, Site
from tests.control.drawn import GRID, TEXT, drawn, hidden, served

SELF = TokenLayout("text-video", 0, GRID)


@pytest.mark.parametrize(
    ("call", "edits"),
    [
        (lambda: drawn(layout=SELF), (Window(frames=0), Bias(-math.inf, frames(0)))),
        (drawn, (MaskRegion("tt"), MaskRegion("tv"))),
        (hidden, (MaskRegion("vv"), MaskRegion("vt"))),
        (drawn, (MaskRegion("tt"), MaskRegion("tv"), Sparsify(0.5))),
    ],
)
def test_edits_that_hide_all_keys_only_together_are_refused_and_named(call, edits):
    for edit in edits:
        assert torch.isfinite(served(call(), edit)).all()
    with pytest.raises(PlanError, match="together hide all keys") as refused:
        served(call(), *edits)
    assert all(str(edit) in str(refused.value) for edit in edits)


def test_what_is_hidden_together_in_other_rows_is_not_refused():
    assert torch.isfinite(served(drawn(), MaskRegion("tt"), MaskRegion("vv"))).all()


def test_rows_that_lost_all_weights_stay_zero_when_made_sparse():
    call = drawn()
    out = served(call, MaskRegion("tt", "zero"), MaskRegion("tv", "zero"), Sparsify(0.5))
    assert torch.equal(out[:, :, :TEXT], torch.zeros_like(out[:, :, :TEXT]))
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("columns", [frames(0), box(0, 0, 1, 1)])
def test_factors_that_multiply_to_more_than_single_precision_holds_are_refused(columns):
    half = Bias(39.0, columns)
    assert torch.isfinite(served(drawn(dtype=torch.float32), half, Bias(39.0, columns))).all()
    with pytest.raises(PlanError, match=r"e\^80.*by all of Bias.*Bias"):
        served(drawn(dtype=torch.float32), half, Bias(45.0, columns))


@pytest.mark.parametrize("strength", [math.nan, math.inf, lambda progress: math.nan])
def test_a_strength_is_a_finite_number(strength):
    with pytest.raises(UsageError, match="strength must be a finite number"):
        served(drawn(), Transfer("kv", 0, 1, strength=strength))


@pytest.mark.parametrize("strength", [1.5, -0.1])
def test_a_region_mask_takes_away_a_share(strength):
    with pytest.raises(UsageError, match="strength of MaskRegion.* must lie in 0 to 1"):
        served(drawn(), MaskRegion("vv", strength=strength))


@pytest.mark.parametrize("place", [(1, 0, 3, 2), (0, 2, 1, 5), (-1, 0, 1, 2), (1, 1, 1, 2)])
def test_a_box_outside_of_the_grid_is_refused(place):
    with pytest.raises(UsageError, match="2 rows and 4 columns of patches. Got top"):
        served(drawn(), Bias(1.0, box(*place)))


def cross():
    """Video looks at the text of three prompts, each in a sequence of its own."""
    call = drawn(3)
    given = {name: getattr(call, name) for name in "qkv"}
    return drawn(
        3,
        site=Site(0, 0, 0, kind="cross"),
        q=given["q"][:, :, TEXT:],
        k=given["k"][:, :, :TEXT],
        v=given["v"][:, :, :TEXT],
        layout=call.layout,
        branches=tuple(Branch(prompt=i) for i in range(3)),
        prompts=call.prompts,
    )


def test_keys_of_the_same_word_from_two_sources_clash_in_cross_attention_too():
    one, other = (Transfer("kv", source, 2, rows=words("cat")) for source in (0, 1))
    served(cross(), one)
    with pytest.raises(PlanError, match="must not change the same tensor"):
        served(cross(), one, other)


def test_a_video_area_of_the_queries_still_clashes_with_itself():
    with pytest.raises(PlanError, match="must not change the same tensor"):
        served(drawn(3), Transfer("q", 0, 2, rows=video()), Transfer("q", 1, 2, rows=video()))
