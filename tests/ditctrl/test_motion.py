"""Motion of drawn clips: how fast, how smooth, and whether a still one is noticed."""

from __future__ import annotations

import numpy as np
import pytest

from ditctrl.motion import STILL, motion
from probe.errors import UsageError
from recipes import scene

FRAMES = 7


def clip(pixels, frames=FRAMES):
    """A red circle that moves so many pixels per frame, of 64."""
    way = pixels * (frames - 1)
    thing = scene.Thing("red", "circle", "right", 11.0, (14, 32), (14 + way, 32))
    return scene.render(scene.Scene((thing,), "blue", frames))


def jittered(frames, pixels):
    offsets = np.random.default_rng(0).integers(-pixels, pixels + 1, (len(frames), 2))
    return np.stack([np.roll(frame, offset, (0, 1)) for frame, offset in zip(frames, offsets, strict=True)])


@pytest.mark.parametrize("pixels", [1, 2, 4])
def test_the_degree_is_the_speed_of_the_object(pixels):
    assert motion(clip(pixels)).degree == pytest.approx(100 * pixels / 64, rel=0.25)


def test_even_motion_is_smooth_and_jitter_is_not():
    even, little, much = (motion(one).smoothness for one in (clip(2), jittered(clip(2), 1), jittered(clip(2), 3)))
    assert even > 0.85
    assert even > little + 0.25 > much + 0.4


def test_a_cut_is_not_smooth():
    red = clip(2)
    assert motion(np.concatenate([red[:4], red[::-1][:3] // 3])).smoothness < motion(red).smoothness - 0.1


def test_a_still_video_is_noticed_even_with_noise():
    still = np.repeat(clip(2)[:1], FRAMES, 0)
    noise = np.random.default_rng(0).normal(0, 3, still.shape)
    noisy = np.clip(still + noise, 0, 255).astype(np.uint8)
    assert motion(still).degree == 0
    assert motion(still).smoothness == 1
    assert motion(still).still
    assert motion(noisy).degree < STILL
    assert not motion(clip(1)).still


def test_noise_well_below_a_grey_level_leaves_a_still_video_smooth():
    still = np.repeat(clip(2)[:1], FRAMES, 0)
    still[::2, :4] += 1
    assert motion(still).smoothness > 0.8


def test_a_large_video_measures_as_its_small_one():
    small = motion(clip(2))
    large = motion(clip(2).repeat(4, 1).repeat(4, 2))
    assert large.degree == pytest.approx(small.degree, rel=0.02)
    assert large.smoothness == pytest.approx(small.smoothness, abs=0.01)


def test_two_frames_are_too_few():
    with pytest.raises(UsageError, match="three frames or more"):
        motion(clip(2, 2))
