"""The world must be readable: what is drawn and described is what the rules read back."""

from dataclasses import replace

import numpy as np
import pytest

from recipes import scene
from recipes.scene import Scene, Thing

RED_CIRCLE = Thing("red", "circle", "right", 11.0, (16.0, 32.0), (44.0, 32.0))
BLUE_SQUARE = Thing("blue", "square", "up", 9.0, (48.0, 52.0), (48.0, 30.0))


def test_rules_read_single_object_clips() -> None:
    rng = np.random.default_rng(7)
    scenes = [scene.sample(rng, pair=0.0) for _ in range(150)]
    wrong = [one for one in scenes if not _agrees(one, scene.classify(scene.render(one)))]
    assert len(wrong) <= 0.01 * len(scenes), wrong


def test_rules_read_any_stretch_of_a_clip() -> None:
    clip = scene.render(Scene((RED_CIRCLE,)))
    for part in (clip[:5], clip[-4:], clip[3:5]):
        verdict = scene.classify(part)
        assert verdict is not None
        assert (verdict.color, verdict.shape, verdict.direction) == ("red", "circle", "right")


def test_one_frame_has_no_direction() -> None:
    verdict = scene.classify(scene.render(Scene((RED_CIRCLE,)))[:1])
    assert verdict is not None
    assert (verdict.shape, verdict.direction) == ("circle", None)


def test_a_still_object_has_no_direction() -> None:
    verdict = scene.classify(scene.render(Scene((replace(RED_CIRCLE, end=RED_CIRCLE.start),))))
    assert verdict is not None
    assert verdict.direction is None


def test_move_is_the_distance_travelled() -> None:
    verdict = scene.classify(scene.render(Scene((RED_CIRCLE,))))
    assert verdict is not None
    assert verdict.move == pytest.approx((28.0, 0.0), abs=0.2)


@pytest.mark.parametrize("background", scene.BACKGROUNDS)
def test_empty_clip_shows_nothing(background: str) -> None:
    assert scene.classify(scene.render(Scene((), background))) is None


def test_captions_read_back() -> None:
    rng = np.random.default_rng(3)
    for _ in range(200):
        one = scene.sample(rng)
        expected = [(thing.color, thing.shape, thing.direction) for thing in one.things]
        for text in (scene.caption(one), scene.caption(one, rng)):
            assert scene.parse(text) == (expected, one.background), text


def test_a_prompt_without_an_object_is_refused() -> None:
    with pytest.raises(ValueError, match="caption must say"):
        scene.parse("a pink dog")


def test_sixty_prompts() -> None:
    prompts = scene.all_prompts()
    assert len(set(prompts)) == 60
    assert all(len(scene.parse(text)[0]) == 1 for text in prompts)


def test_masks_cover_the_drawn_objects() -> None:
    rng = np.random.default_rng(5)
    for _ in range(20):
        one = scene.sample(rng, pair=0.5)
        drawn, _ = scene.foreground(scene.render(one))
        true = scene.masks(one).any(0)
        assert (drawn & true).sum() / (drawn | true).sum() > 0.85


def test_each_object_of_a_pair_is_found_by_its_color() -> None:
    one = Scene((RED_CIRCLE, BLUE_SQUARE), "white")
    clip = scene.render(one)
    for thing, true in zip(one.things, scene.masks(one), strict=True):
        found = scene.object_mask(clip, thing.color)
        assert (found & true).sum() / (found | true).sum() > 0.85
    assert not scene.object_mask(clip, "yellow").any()


def test_pairs_never_touch_and_differ_in_color() -> None:
    rng = np.random.default_rng(11)
    for _ in range(50):
        one = scene.sample(rng, pair=1.0)
        first, second = scene.masks(one)
        assert not (first & second).any()
        assert one.things[0].color != one.things[1].color


def test_objects_stay_inside_the_frame() -> None:
    rng = np.random.default_rng(2)
    for _ in range(100):
        inside = np.any(scene.masks(scene.sample(rng)), axis=0)
        assert not inside[:, [0, -1]].any()
        assert not inside[:, :, [0, -1]].any()


def test_token_mask_pools_frames_as_the_latents_do() -> None:
    mask = np.zeros((17, 64, 64), bool)
    mask[0, :8, :8] = True  # latent frame 0 is pixel frame 0
    mask[5:7, 8:16, :4] = True  # half of latent frame 2's pixel frames, half of one token
    share = scene.token_mask(mask)
    assert share.shape == (5, 8, 8)
    assert (share[0, 0, 0], share[2, 1, 0]) == (1.0, 0.25)
    assert share.sum() == 1.25


def test_token_mask_refuses_a_grid_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="mask must have"):
        scene.token_mask(np.zeros((16, 64, 64), bool))


def _agrees(one: Scene, verdict: scene.Verdict | None) -> bool:
    thing = one.things[0]
    return verdict is not None and (
        (verdict.color, verdict.shape, verdict.direction, verdict.background)
        == (thing.color, thing.shape, thing.direction, one.background)
    )
