"""Each derived number against a slow loop over one head at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest

from probe import measure
from probe.errors import LayoutError

F = 6


@pytest.fixture
def joint():
    """Frame matrices [L, H, F, F + 1] whose rows sum to one, the text last."""
    rows = np.random.default_rng(0).random((2, 3, F, F + 1)) ** 3
    return rows / rows.sum(-1, keepdims=True)


@pytest.fixture
def columns():
    """Column masses [L, H, N] with a few strong ones; each head sums to one."""
    masses = np.random.default_rng(1).random((2, 3, 50)) ** 12
    return masses / masses.sum(-1, keepdims=True)


def every(matrices, one):
    """`one` of each head's matrix, by a loop."""
    return np.array([[one(matrix) for matrix in layer] for layer in matrices])


def pairs(offset):
    return [(f, g) for f in range(F) for g in range(F) if abs(f - g) == offset]


def test_enrichment_is_one_for_uniform_attention():
    sizes = np.array([[3, 9, 0, 48], [3, 9, 0, 48], [3, 9, 16, 32]])
    uniform = np.broadcast_to(sizes / 60, (2, 5, 3, 4))
    lift = measure.enrichment(uniform, sizes, 60)
    assert np.allclose(lift[..., [0, 1, 3]], 1)
    assert np.isnan(lift[..., :2, 2]).all()
    assert np.allclose(lift[..., 2, 2], 1)
    assert measure.enrichment([[0.5, 0.5]], [3, 57], 60)[0, 0] == pytest.approx(10)


@pytest.mark.parametrize("sizes", [[3, 57], [[3, 9, 16, 32]] * 2, 60])
def test_sizes_that_do_not_fit_are_refused(sizes):
    with pytest.raises(LayoutError, match=r"must be \[C\] or \[R, C\] for masses .* for \(3, 4\)"):
        measure.enrichment(np.ones((3, 4)), sizes, 60)


def test_video_conditional_rows_sum_to_one(joint):
    found = measure.video_conditional(joint)
    assert np.allclose(found, every(joint, lambda t: [[row[g] / sum(row[:F]) for g in range(F)] for row in t]))
    assert np.isnan(measure.video_conditional([[0.0, 0.0, 1.0], [0.5, 0.0, 0.5]])).tolist() == [
        [True, True],
        [False] * 2,
    ]


def test_distance_profile_is_the_mean_over_pairs_of_frames(joint):
    slow = every(joint, lambda t: [np.mean([t[f, g] for f, g in pairs(d)]) for d in range(F)])
    assert np.allclose(measure.distance_profile(joint), slow)
    assert np.allclose(measure.distance_profile(joint[..., :F]), slow)


def test_distance_decay_is_the_fit_of_log_mass(joint):
    rate, r2 = measure.distance_decay(joint)

    def slow(t):
        y = np.log([np.mean([t[f, g] for f, g in pairs(d)]) for d in range(1, F)])
        slope, start = np.polyfit(range(1, F), y, 1)
        left = y - slope * np.arange(1, F) - start
        return -slope, 1 - left.var() / y.var()

    assert np.allclose(np.stack([rate, r2], -1), every(joint, slow))


def test_distance_decay_finds_a_planted_rate():
    apart = np.abs(np.subtract.outer(np.arange(F), np.arange(F)))
    planted = np.stack([0.2 * np.exp(-rate * apart) for rate in (0.0, 0.7, -0.1)])
    planted[:, range(F), range(F)] = 0.9  # the frame's own mass has no part in the fit
    planted *= 1 + 1e-9 * np.random.default_rng(4).random(planted.shape)  # and rounding is no profile
    rate, r2 = measure.distance_decay(planted)
    assert np.allclose(rate, [0, 0.7, -0.1])
    assert np.allclose(r2, [np.nan, 1, 1], equal_nan=True)


def test_distance_decay_leaves_out_distances_without_mass():
    apart = np.abs(np.subtract.outer(np.arange(F), np.arange(F)))
    near = np.where(apart < 4, np.exp(-0.5 * apart), 0)
    nearer = np.where(apart < 3, near, 0)
    rate, r2 = measure.distance_decay(np.stack([near, nearer]))
    assert np.allclose(rate, [0.5, np.nan], equal_nan=True)
    assert np.allclose(r2, [1, np.nan], equal_nan=True)
    assert np.isnan(measure.distance_decay(np.full((3, 3), 0.1))).all()
    assert np.isnan(measure.distance_decay([[1.0]])).all()


def test_masses_of_a_frame_matrix(joint):
    assert np.allclose(measure.self_frame_mass(joint), every(joint, lambda t: np.mean([t[f, f] for f in range(F)])))
    first = every(joint, lambda t: np.mean([t[f, 0] for f in range(1, F)]))
    assert np.allclose(measure.first_frame_mass(joint), first)
    assert np.allclose(measure.text_mass(joint), every(joint, lambda t: np.mean([row[F] for row in t])))
    assert np.allclose(measure.self_frame_mass(np.full((F, F), 1 / F)), 1 / F)
    assert np.isnan(measure.first_frame_mass([[1.0]]))


def test_causality_weighs_past_against_future(joint):
    def slow(t):
        past = sum(t[f, g] for f in range(F) for g in range(f))
        future = sum(t[f, g] for f in range(F) for g in range(f + 1, F))
        return (past - future) / (past + future)

    assert np.allclose(measure.causality(joint), every(joint, slow))
    assert measure.causality(np.tri(F)) == 1
    assert measure.causality(np.tri(F).T) == -1
    assert measure.causality(np.ones((F, F))) == 0
    assert np.isnan(measure.causality(np.eye(F)))


@pytest.mark.parametrize("shape", [(5,), (3, 5), (3, 2), (2, 0, 1)])
def test_a_matrix_that_is_not_frame_by_frame_is_refused(shape):
    with pytest.raises(LayoutError, match=r"must be \[\.\.\., F, F\], or"):
        measure.distance_profile(np.ones(shape))


def test_text_mass_needs_the_text_column():
    with pytest.raises(LayoutError, match=r"to tell its text mass. Got \(6, 6\)"):
        measure.text_mass(np.ones((F, F)))


def test_entropy_as_a_share_and_as_a_number_of_keys():
    rows = np.random.default_rng(2).dirichlet(np.ones(40), (2, 3))
    entropy = np.array([[-sum(p * math.log(p) for p in row) for row in layer] for layer in rows])
    slow = [[math.prod(p**-p for p in row) for row in layer] for layer in rows]
    assert np.allclose(measure.effective_keys(entropy), slow)
    assert np.allclose(measure.normalised_entropy(entropy, 40), np.log(slow) / math.log(40))
    assert measure.normalised_entropy(math.log(40), 40) == pytest.approx(1)
    with pytest.raises(LayoutError, match="at least 2 keys. Got 1"):
        measure.normalised_entropy(0.0, 1)


def test_sinks_are_the_columns_above_ten_times_uniform(columns):
    sinks = [[[j for j in range(50) if c[j] * 50 > 10] for c in layer] for layer in columns]
    assert 0 < sum(len(found) for layer in sinks for found in layer) < 20
    found = measure.sink_set(columns)
    assert [[np.flatnonzero(head).tolist() for head in layer] for layer in found] == sinks
    slow = [[sum(columns[i, h, j] for j in sinks[i][h]) for h in range(3)] for i in range(2)]
    assert np.allclose(measure.sink_mass(columns), slow)
    assert np.allclose(measure.sink_score(columns), every(columns, max))
    assert np.allclose(measure.column_enrichment(columns).mean(-1), 1)
    assert not measure.sink_set(np.full(50, 1 / 50), tau=1.0000001).any()


def test_overlap_of_sets():
    a, b = np.random.default_rng(3).random((2, 4, 3, 20)) < 0.3
    slow = [
        [
            len({*np.flatnonzero(x)} & {*np.flatnonzero(y)}) / len({*np.flatnonzero(x)} | {*np.flatnonzero(y)})
            for x, y in zip(*rows, strict=True)
        ]
        for rows in zip(a, b, strict=True)
    ]
    assert np.allclose(measure.set_overlap(a, b), slow)
    assert np.isnan(measure.set_overlap([False, False], [False, False]))
    assert measure.set_overlap([True, False], [False, True]) == 0


def test_head_classes_follow_their_rules_in_order():
    heads = {
        # spatial, temporal, text, sink; uniform shares: a fifth for the own frame, a tenth for the own position
        "text": (0.2, 0.1, 0.6, 0.6),
        "sink": (0.9, 0.1, 0.1, 0.6),
        "spatial": (0.4, 0.15, 0.1, 0.0),
        "temporal": (0.4, 0.25, 0.1, 0.0),
        "global": (0.25, 0.12, 0.1, 0.0),
        "unknown": (0.25, np.nan, 0.1, 0.0),
    }
    spatial, temporal, text, sink = masses = np.array(list(heads.values())).T
    assert measure.head_class(spatial, temporal, text, sink, (0.2, 0.1)).tolist() == list(heads)
    a, b, c, d = masses.reshape(4, 2, 3)
    grid = measure.head_class(a, b, c, d, (0.2, 0.1))
    assert grid.tolist() == [["text", "sink", "spatial"], ["temporal", "global", "unknown"]]
    loose = measure.head_class(
        spatial, temporal, text, sink, (0.2, 0.1), text_above=0.7, sink_above=0.7, lift_above=1.1
    )
    assert loose.tolist() == ["global", "spatial", "spatial", "temporal", "spatial", "unknown"]


def test_settling_step_is_the_start_of_the_last_high_stretch():
    rows = [[0.1, 0.95, 0.5, 0.91, 0.99, 1.0], [1.0] * 6, [0.0] * 5 + [1.0], [1.0] * 5 + [0.9]]
    assert measure.settling_step(rows).tolist() == [3, 0, 5, 6]
    assert measure.settling_step(np.array(rows).reshape(2, 2, 6), 0.4).tolist() == [[1, 0], [5, 0]]
