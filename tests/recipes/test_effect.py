"""Each measure on drawn clips, where the truth is known."""

from __future__ import annotations

import numpy as np
import pytest

from probe.errors import UsageError
from recipes import effect, scene
from recipes.effect import Made, measured

RED = scene.Thing("red", "circle", "right", 10.0, (20, 32), (44, 32))
YELLOW = scene.Thing("yellow", "circle", "right", 10.0, (20, 32), (44, 32))
LOW = scene.Thing("red", "square", "left", 10.0, (44, 48), (20, 48))
TEXTS = {
    "red": "a red circle moving right on a blue background",
    "yellow": "a yellow circle moving right on a blue background",
    "low": "a red square moving left on a blue background",
    "none": "a red circle moving right on a blue background",
}


@pytest.fixture(scope="module")
def made():
    things = {"red": (RED,), "yellow": (YELLOW,), "low": (LOW,), "none": ()}
    clips = {name: scene.render(scene.Scene(some, "blue")) for name, some in things.items()}
    mask = scene.token_mask(scene.masks(scene.Scene((RED,), "blue"))[0]) > 0.5
    return Made(clips, TEXTS, {"object": mask, "rest": ~mask}, {"told": 0.25})


def test_clips_that_agree_reach_the_ceiling(made):
    assert effect.psnr(made, "red", "red") == effect.background_psnr(made, "red", "red") == 50
    assert effect.ssim(made, "red", "red") == 1
    assert effect.object_iou(made, "red", "red") == 1


def test_a_recolour_keeps_the_background_and_the_outline_but_not_the_picture(made):
    assert effect.background_psnr(made, "yellow", "red") == 50
    assert effect.object_iou(made, "yellow", "red") > 0.95
    assert effect.psnr(made, "yellow", "red") < 25


def test_an_object_elsewhere_has_no_outline_in_common(made):
    assert effect.object_iou(made, "low", "red") < 0.2
    assert effect.background_psnr(made, "low", "red") == 50  # outside of both objects nothing differs
    assert effect.ssim(made, "low", "red") < 0.95


def test_an_outline_can_be_that_of_one_color_alone(made):
    both = scene.render(scene.Scene((RED, scene.Thing("green", "square", "up", 9.0, (54, 56), (54, 54))), "blue"))
    made = Made({**made.clips, "both": both}, TEXTS)
    assert effect.object_iou(made, "both", "red", "red") == 1
    assert effect.object_iou(made, "both", "red") < 0.7
    assert effect.object_iou(made, "both", "red", "green") == 0


def test_psnr_is_that_of_the_definition():
    a = np.zeros((1, 8, 8, 3), np.uint8)
    b = a + np.uint8(16)
    assert effect.psnr(Made({"a": a, "b": b}, {}), "a", "b") == pytest.approx(20 * np.log10(255 / 16))


def test_colors_are_told_by_the_pixels_of_the_object(made):
    assert effect.color_share(made, "red", "red") > 0.95
    assert effect.color_share(made, "red", "yellow") < 0.05
    assert effect.color_share(made, "none", "red") == 0
    assert effect.color_error(made, "red", "red") < 2
    assert effect.color_error(made, "yellow", "red") > 100
    assert effect.color_error(made, "none", "red") == 442


def test_agreement_counts_what_the_text_says(made):
    assert effect.agreement(made, "red") == 1
    assert effect.agreement(made, "yellow", TEXTS["red"]) == 0.75
    assert effect.agreement(made, "low", TEXTS["red"]) == 0.5
    assert effect.agreement(made, "none") == 0


def test_places_and_presence(made):
    assert effect.inside_box(made, "low", "red", (0.5, 0, 1, 1)) == 1
    assert effect.inside_box(made, "low", "red", (0, 0, 0.5, 1)) == 0
    assert 0.45 < effect.inside_box(made, "red", "red", (0, 0, 0.5, 1)) < 0.55
    assert effect.inside_box(made, "none", "red", (0, 0, 1, 1)) == 0
    assert effect.inside_frames(made, "red", "red", (0, 1)) == 1
    assert effect.inside_frames(made, "red", "red", (0, 0.5)) == pytest.approx(8 / 17, abs=0.01)
    assert effect.inside_frames(made, "none", "red", (0, 1)) == 0
    assert effect.presence(made, "red", "red") == 1
    assert effect.presence(made, "red", "green") == 0
    assert effect.object_share(made, "none") == effect.object_share(made, "red", "green") == 0
    assert effect.object_share(made, "red", "red") == pytest.approx(effect.object_share(made, "red"), rel=0.05)
    assert effect.object_share(made, "red") == pytest.approx(np.pi * 10**2 / 64**2, rel=0.05)


def test_a_cut_is_the_largest_jump(made):
    smooth = effect.largest_jump(made, "red")
    cut = np.concatenate([made.clips["red"][:8], made.clips["low"][8:]])
    assert effect.largest_jump(Made({"cut": cut}, {}), "cut") > 3 * smooth


def test_a_mask_is_compared_on_the_token_grid(made):
    assert effect.mask_iou(made, "object", "red") > 0.9
    assert effect.mask_iou(made, "object", "red", color="red") > 0.9
    assert effect.mask_iou(made, "rest", "red") == 0


def test_shapes_fit_their_own_drawing_best(made):
    assert effect.shape_fit(made, "red") > 0.95
    assert effect.shape_fit(made, "red", "a red square moving right") == pytest.approx(np.pi / 4, abs=0.03)
    assert effect.shape_fit(made, "red", "a yellow circle moving right") == 0
    both = "a red circle moving right and a yellow circle moving left"
    assert effect.shape_fit(made, "red", both) == pytest.approx(effect.shape_fit(made, "red") / 2)


def test_measures_go_by_name_and_refuse_what_they_do_not_know(made):
    assert measured(made, "number", {"name": "told"}) == 0.25
    assert measured(made, "color_share", {"of": "red", "color": "red"}) > 0.95
    with pytest.raises(UsageError, match="must be one of psnr"):
        measured(made, "beauty", {})
    with pytest.raises(UsageError, match="own arguments"):
        measured(made, "psnr", {"of": "red", "with": "low"})
    with pytest.raises(UsageError, match="own arguments"):
        measured(made, "psnr", {"of": "red", "to": "nobody"})
    with pytest.raises(UsageError, match="one object"):
        effect.agreement(made, "red", "a red circle moving right and a blue square moving left")
