"""Masks from maps, against slow loops over patches."""

from __future__ import annotations

import numpy as np
import pytest

from probe import mask
from probe.errors import LayoutError, UsageError
from probe.layout import Grid

SHAPE = (3, 6, 4)  # four columns: scikit-image takes a last axis of 3 or 4 for colours


@pytest.fixture
def lift():
    """A bright square that moves over a dim ground, float32 [F, Y, X]."""
    values = np.random.default_rng(0).random(SHAPE).astype(np.float32)
    for frame in range(3):
        values[frame, frame : frame + 3, :2] += 3
    return values


@pytest.fixture
def square(lift):
    return lift > 2


def drawn(*rows):
    """A mask of one frame from rows of # and dots."""
    return np.array([[[patch == "#" for patch in row] for row in rows]])


def overlap(a, b):
    a, b = {tuple(i) for i in np.argwhere(a)}, {tuple(i) for i in np.argwhere(b)}
    return len(a & b) / len(a | b)


def test_a_threshold_is_exceeded_not_met():
    assert mask.threshold([[[1.0, 1.5, 2.0]]], 1.5).tolist() == [[[False, False, True]]]


def test_otsu_parts_ground_and_square(lift, square):
    assert np.array_equal(mask.otsu(lift), square)
    assert np.array_equal(mask.otsu(1e-6 * lift), square)
    assert not mask.otsu(np.full(SHAPE, 0.7, np.float32)).any()


def test_otsu_has_the_largest_variance_between_its_groups():
    values = np.random.default_rng(6).integers(0, 256, SHAPE) / 255
    values[0, 0, :2] = 0, 1

    def between(level):
        low, high = values[values < level], values[values >= level]
        return len(low) * len(high) * (high.mean() - low.mean()) ** 2

    best = max(np.unique(values)[1:], key=between)
    assert np.array_equal(mask.otsu(values), values >= best)


def test_top_takes_a_share_and_what_equals_its_last(lift):
    ordered = sorted(lift.ravel().tolist(), reverse=True)
    assert np.array_equal(mask.top(lift, 0.25), lift >= ordered[17])
    assert mask.top(lift, 0.25).sum() == 18
    assert mask.top(lift, 1e-9).sum() == 1
    assert mask.top(np.ones(SHAPE), 0.1).all()
    for share in (0, 1.2, np.nan):
        with pytest.raises(UsageError, match="must lie in 0 to 1"):
            mask.top(lift, share)


def test_normalising_reaches_from_zero_to_one(lift):
    clip = mask.normalise(lift, "clip")
    assert np.allclose(clip, (lift - lift.min()) / (lift.max() - lift.min()))
    for frame, values in zip(mask.normalise(lift, "frame"), lift, strict=True):
        assert np.allclose(frame, (values - values.min()) / (values.max() - values.min()))
    assert np.array_equal(mask.normalise(lift, "none"), lift)


def test_normalising_an_even_frame_amplifies_no_rounding(lift):
    lift[1] = 0.3
    lift[1, 2, 2] = np.nextafter(np.float32(0.3), np.float32(1))
    assert not mask.normalise(lift, "frame")[1].any()
    assert mask.normalise(lift, "frame")[0].max() == 1


def test_smoothing_is_a_gaussian_within_each_frame(lift):
    reach = range(-20, 21)
    weights = {(y, x): np.exp(-(y * y + x * x) / (2 * 0.8**2)) for y in reach for x in reach}
    y0, x0 = 0, 0

    def slow(frame):
        near = {at: lift[frame, np.clip(y0 + at[0], 0, 5), np.clip(x0 + at[1], 0, 3)] for at in weights}
        return sum(weights[at] * near[at] for at in weights) / sum(weights.values())

    found = mask.smooth(lift, 0.8)
    assert [found[frame, y0, x0] for frame in range(3)] == pytest.approx([slow(f) for f in range(3)], rel=1e-3)
    assert np.array_equal(mask.smooth(lift, 0), lift)
    with pytest.raises(UsageError, match="0 patches or more. Got -1"):
        mask.smooth(lift, -1)


def test_the_largest_component_of_the_clip_and_of_each_frame():
    found = np.concatenate([drawn("##..#", "....#"), drawn(".#..#", "....."), drawn("#....", ".####")])
    left = np.concatenate([drawn("##...", "....."), drawn(".#...", "....."), drawn(".....", ".....")])
    right = np.concatenate([drawn("....#", "....#"), drawn("....#", "....."), drawn(".....", ".....")])
    assert np.array_equal(
        mask.largest_component(found), found & (np.arange(3)[:, None, None] == 2) & [[[False], [True]]]
    )
    assert np.array_equal(mask.largest_component(left | right), left)
    single = np.concatenate([drawn("##...", "....."), drawn(".#...", "....."), drawn(".....", ".####")])
    assert np.array_equal(mask.largest_component(found, "frame"), single)
    assert not mask.largest_component(np.zeros(SHAPE, bool)).any()


def test_components_touch_at_their_sides_and_through_time():
    assert mask.largest_component(drawn("#..", ".#.", "..#")).sum() == 1
    through = np.concatenate([drawn("#.##"), drawn("#..."), drawn("#...")])
    assert np.array_equal(mask.largest_component(through), through & np.array([True, False, False, False]))


def test_opening_removes_specks_and_closing_fills_holes():
    speck = drawn(".....#", ".###..", ".###..", ".###..", "......")
    hole = drawn("......", ".###..", ".#.#..", ".###..", "......")
    cross = drawn("......", "..#...", ".###..", "..#...", "......")
    assert np.array_equal(mask.opening(speck, 1), cross)
    assert np.array_equal(mask.closing(hole, 1), hole | cross)
    edge = drawn("##....", "##....", "......")
    assert np.array_equal(mask.opening(edge, 1), drawn("##....", "#.....", "......"))
    assert np.array_equal(mask.closing(edge, 1), edge)
    assert np.array_equal(mask.closing(drawn("#.#", "#.#", "###"), 1), drawn("#.#", "###", "###"))  # open to the edge
    assert np.array_equal(mask.opening(speck, 0), speck)
    with pytest.raises(UsageError, match="radius of a disk must be 0 patches or more. Got -1"):
        mask.closing(hole, -1)


def test_frames_are_cleaned_apart():
    blink = np.concatenate([np.zeros((1, 5, 5), bool), np.ones((1, 5, 5), bool), np.zeros((1, 5, 5), bool)])
    assert np.array_equal(mask.opening(blink, 1), blink)


def test_resizing_takes_the_nearest_patch(square):
    grid = Grid(5, 9, 7)
    found = mask.resize(square, grid)
    slow = np.zeros(grid.shape, bool)
    for f, y, x in np.ndindex(grid.shape):
        old = [int((i + 0.5) * n / m) for i, n, m in zip((f, y, x), SHAPE, grid.shape, strict=True)]
        slow[f, y, x] = square[tuple(old)]
    assert np.array_equal(found, slow)
    assert np.array_equal(mask.resize(mask.resize(square, Grid(6, 12, 8)), Grid(*SHAPE)), square)


@pytest.mark.parametrize("size", [(2, 4, 3), (3, 8, 5)])
def test_resizing_by_area_asks_for_the_covered_share(square, size):
    fine = square.repeat(size[0], 0).repeat(size[1], 1).repeat(size[2], 2)  # both grids divide this one
    blocks = fine.reshape(size[0], 3, size[1], 6, size[2], 4)
    cover = blocks.mean((1, 3, 5))
    for share in (0.2, 0.47, 0.8):
        assert np.array_equal(mask.resize(square, Grid(*size), "area", share), cover > share)


def test_extract_is_its_parts_in_order(lift):
    by_hand = mask.normalise(mask.smooth(lift, 0.4), "frame") > 0.15
    assert np.array_equal(mask.extract(lift, "threshold", 0.15, sigma=0.4, per="frame"), by_hand)
    largest = mask.extract(lift, "threshold", 0.15, sigma=0.4, per="frame", component=True)
    assert np.array_equal(largest, mask.largest_component(by_hand))
    found = mask.extract(lift, "threshold", 0.15, sigma=0.4, per="frame", radius=1, component=True)
    assert np.array_equal(found, mask.largest_component(mask.opening(by_hand, 1)))
    assert found.sum() < largest.sum() < by_hand.sum()
    assert np.array_equal(mask.extract(lift, "threshold", 2.0, per="none"), lift > 2)
    assert np.array_equal(mask.extract(lift, "top", 0.2), mask.top(lift, 0.2))
    assert np.array_equal(mask.extract(lift), lift > 2)


@pytest.mark.parametrize(("method", "value"), [("otsu", 0.5), ("threshold", None), ("top", None)])
def test_extract_refuses_a_value_too_many_or_too_few(lift, method, value):
    with pytest.raises(UsageError, match=f"Got {method} with {value}"):
        mask.extract(lift, method, value)


def test_iou_counts_patches(square):
    other = np.random.default_rng(1).random(SHAPE) > 0.5
    assert mask.iou(square, other) == pytest.approx(overlap(square, other))
    assert mask.iou_per_frame(square, other).tolist() == pytest.approx([overlap(square[f], other[f]) for f in range(3)])
    assert mask.temporal_iou(square).tolist() == pytest.approx([overlap(square[f], square[f + 1]) for f in range(2)])
    assert mask.temporal_iou(square[:1]).shape == (0,)
    empty = np.zeros(SHAPE, bool)
    assert mask.iou(empty, square) == 0
    assert np.isnan(mask.iou(empty, empty))


def test_pointing_is_the_share_of_frames_whose_peak_is_inside(lift, square):
    square[0] = False
    square[0, 5, 3] = True
    assert mask.pointing(lift, square) == pytest.approx(2 / 3)
    square[0] = False  # a frame without the thing does not count
    assert mask.pointing(lift, square) == 1
    assert np.isnan(mask.pointing(lift, np.zeros(SHAPE, bool)))


def test_best_iou_is_the_best_of_all_thresholds():
    values = np.random.default_rng(2).integers(0, 9, SHAPE).astype(np.float32) / 7
    truth = (values + np.random.default_rng(3).random(SHAPE)) > 1
    slow = {level: overlap(values >= level, truth) for level in np.unique(values)}
    best, level = mask.best_iou(values, truth)
    assert best == pytest.approx(max(slow.values()))
    assert mask.iou(mask.threshold(values, level), truth) == best
    assert np.isnan(mask.best_iou(values, np.zeros(SHAPE, bool))).all()


def test_average_precision_sums_precision_over_recall():
    values = np.random.default_rng(4).integers(0, 9, SHAPE) / 7
    truth = (values + np.random.default_rng(5).random(SHAPE)) > 1
    total, recall = 0.0, 0.0
    for level in np.unique(values)[::-1]:
        hit, chosen = (truth & (values >= level)).sum(), (values >= level).sum()
        total += (hit / truth.sum() - recall) * hit / chosen
        recall = hit / truth.sum()
    assert mask.average_precision(values, truth) == pytest.approx(total)
    assert mask.average_precision(truth.astype(float), truth) == 1
    assert np.isnan(mask.average_precision(values, np.zeros(SHAPE, bool)))


@pytest.mark.parametrize(
    "compare", [mask.iou, mask.iou_per_frame, mask.pointing, mask.best_iou, mask.average_precision]
)
def test_a_mask_of_another_grid_is_one_sentence_with_both(compare):
    with pytest.raises(LayoutError, match=r"must lie on one grid. Got \(3, 6, 4\) and \(3, 4, 6\)"):
        compare(np.zeros(SHAPE), np.zeros((3, 4, 6), bool))


@pytest.mark.parametrize("shape", [(6, 4), (1, 3, 6, 4), (0, 6, 4)])
def test_a_map_of_other_axes_is_refused(shape):
    for made in (mask.extract, mask.temporal_iou, lambda m: mask.resize(m, Grid(1, 1, 1))):
        with pytest.raises(LayoutError, match="must have three axes"):
            made(np.zeros(shape))
