"""Each number on videos and features whose truth is known."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from ditctrl import metric
from probe.errors import UsageError

RNG = np.random.default_rng(0)
A, B = np.linalg.qr(RNG.normal(size=(16, 2)))[0].T  # two unrelated scenes


def drift(frames=50, angle=0.5):
    """Features that turn evenly."""
    at = np.linspace(0, angle, frames)[:, None]
    return np.cos(at) * A + np.sin(at) * B


def cut(before, after):
    return np.concatenate([np.tile(A, (before, 1)), np.tile(B, (after, 1))])


def blended(start, stop, frames):
    """From A to B along a line, between two places."""
    at = np.clip((np.arange(frames) + 0.5 - start) / (stop - start), 0, 1)[:, None]
    return (1 - at) * A + at * B


def test_cscv_is_that_of_the_definition():
    features = RNG.normal(size=(9, 5)) + 2
    alike = []
    for one, other in pairwise(features):
        alike.append(one @ other / np.sqrt((one @ one) * (other @ other)))
    mean = sum(alike) / 8
    deviation = (sum((s - mean) ** 2 for s in alike) / 8) ** 0.5
    assert metric.cscv(features) == pytest.approx(1 / (1 + 10 * deviation / mean))
    assert metric.cscv(features, penalty=3) == pytest.approx(1 / (1 + 3 * deviation / mean))


def test_cscv_of_a_constant_video_is_one():
    assert metric.cscv(np.tile(A, (50, 1))) == pytest.approx(1)


def test_cscv_of_one_cut_is_low_and_of_a_smooth_drift_high():
    assert metric.cscv(cut(25, 25)) == pytest.approx(0.409, abs=5e-4)  # s: 48 ones and a zero
    wavering = np.linspace(0, 0.5, 50) + 0.01 * np.sin(np.arange(50))
    assert metric.cscv(np.cos(wavering)[:, None] * A + np.sin(wavering)[:, None] * B) > 0.99
    assert metric.cscv(drift()) == pytest.approx(1)


def test_cscv_does_not_depend_on_lengths():
    features = RNG.normal(size=(9, 5)) + 2
    assert metric.cscv(features * RNG.uniform(0.1, 10, (9, 1))) == pytest.approx(metric.cscv(features))


def test_cscv_is_nothing_where_neighbours_are_opposites():
    assert metric.cscv(np.stack([A, -A, A])) == 0


@pytest.mark.parametrize("features", [A, A[None], np.zeros((3, 4)), np.full((3, 4), np.nan)])
def test_features_that_cannot_be_compared_are_refused(features):
    with pytest.raises(UsageError, match=r"Features must be .*\. Got .*\. (Give|Look)"):
        metric.cscv(features)


def test_consistency_is_that_of_the_definition():
    features = RNG.normal(size=(6, 4)) + 1
    unit = [f / np.linalg.norm(f) for f in features]
    parts = [(unit[0] @ unit[t] + unit[t - 1] @ unit[t]) / 2 for t in range(1, 6)]
    assert metric.consistency(features) == pytest.approx(np.mean(parts))
    assert metric.consistency(np.tile(A, (4, 1))) == pytest.approx(1)
    assert metric.consistency(cut(2, 2)) == pytest.approx((2 + 1 + 1) / 2 / 3 - 1 / 3 / 2 * 1)


def test_a_cut_out_object_does_not_see_what_lies_behind_it():
    frames = RNG.integers(0, 255, (3, 4, 6, 3), np.uint8)
    inside = np.zeros((3, 4, 6), bool)
    inside[:, 1:3, 2:4] = True
    out = metric.cut_out(frames, inside, 127)
    assert (out[~inside] == 127).all()
    assert np.array_equal(out[inside], frames[inside])
    background = metric.cut_out(frames, ~inside)
    for frame, kept, mask in zip(background, frames, inside, strict=True):
        assert np.abs(frame[mask] - kept[~mask].mean(0)).max() <= 0.5
        assert np.array_equal(frame[~mask], kept[~mask])


def test_a_mask_with_an_empty_frame_is_refused():
    with pytest.raises(UsageError, match="Leave that frame out"):
        metric.cut_out(np.zeros((2, 4, 4, 3), np.uint8), np.zeros((2, 4, 4), bool))


def test_frames_belong_to_the_span_their_middle_lies_in():
    share = metric.shares([(0, 2.4), (2.4, 5.6), (5.6, 8)], 8)
    assert share.argmax(1).tolist() == [0, 0, 1, 1, 1, 1, 2, 2]
    assert np.array_equal(share.max(1), np.ones(8))


def test_in_a_gap_the_next_prompt_rises():
    share = metric.shares([(0, 2), (6, 8)], 8)
    assert share[:, 1] == pytest.approx([0, 0, 0.125, 0.375, 0.625, 0.875, 1, 1])
    assert share.sum(1) == pytest.approx(np.ones(8))


@pytest.mark.parametrize("spans", [[], [(0, 0)], [(0, 3), (2, 4)], [(3, 5), (0, 3)]])
def test_spans_that_do_not_follow_each_other_are_refused(spans):
    with pytest.raises(UsageError, match="Spans must follow each other"):
        metric.shares(spans, 5)


def test_a_frame_is_compared_with_the_prompt_that_is_shown():
    images, texts = cut(3, 3), np.stack([A, B])
    right = metric.shares([(0, 3), (3, 6)], 6)
    assert metric.text_similarity(images, texts, right) == pytest.approx(np.ones(6))
    assert metric.text_similarity(images, texts, right[::-1]) == pytest.approx(np.zeros(6))
    assert metric.text_margin(images, texts, right) == pytest.approx(np.ones(6))
    assert metric.text_margin(images, texts, right[::-1]) == pytest.approx(-np.ones(6))


def test_in_a_transition_both_prompts_count_by_their_shares():
    between = ((A + B) / np.sqrt(2))[None]
    share = np.array([[0.25, 0.75]])
    assert metric.text_similarity(A[None], np.stack([A, B]), share) == pytest.approx([0.25])
    assert metric.text_similarity(between, np.stack([A, B]), share) == pytest.approx([np.sqrt(0.5)])


def test_one_prompt_has_no_margin():
    assert np.isnan(metric.text_margin(cut(2, 2), A[None], np.ones((4, 1)))).all()


@pytest.mark.parametrize("at", [20, 25, 31])
def test_a_cut_is_found_where_it_is(at):
    found = metric.turn(cut(at, 50 - at), (0, 25), (25, 50))
    assert found.frame == pytest.approx(at)
    assert (found.width, found.sharpness, found.contrast) == pytest.approx((0.8, 1, 1))


@pytest.mark.parametrize(("start", "stop"), [(20, 30), (18.5, 24.5), (22, 32)])
def test_a_slow_turn_is_as_wide_as_it_is(start, stop):
    """On features that are not normalised away from the line: the way is an angle, not a length."""
    features = blended(start, stop, 50)
    found = metric.turn(features, (0, 25), (25, 50))
    assert found.frame == pytest.approx((start + stop) / 2, abs=0.1)
    assert 0.6 * (stop - start) < found.width < 0.85 * (stop - start)
    assert 1 / (stop - start) < found.sharpness < 2 / (stop - start)


def test_noise_hardly_moves_a_turn():
    rng = np.random.default_rng(1)
    features = blended(22, 28, 50)
    quiet = metric.turn(features, (0, 25), (25, 50))
    noisy = metric.turn(features + 0.05 * rng.normal(size=features.shape), (0, 25), (25, 50))
    assert noisy.frame == pytest.approx(quiet.frame, abs=0.5)
    assert noisy.width == pytest.approx(quiet.width, abs=1)


def test_the_way_is_made_monotone_not_taken_at_its_first_touch():
    """A flash of the second scene long before the turn is not the turn."""
    features = cut(25, 25)
    features[14] = B
    assert metric.turn(features, (0, 25), (25, 50)).frame == pytest.approx(25, abs=0.5)


def test_a_video_that_does_not_turn_has_no_contrast():
    found = metric.turn(np.tile(A, (50, 1)), (0, 25), (25, 50))
    assert found.contrast == 0
    assert np.isnan(found.frame)


def test_spans_too_short_to_look_at_are_refused():
    with pytest.raises(UsageError, match="Show each prompt for longer"):
        metric.turn(cut(2, 2), (0, 0.4), (0.4, 4))
