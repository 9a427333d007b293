"""Differences of two measurements, and the heads that stand out."""

from __future__ import annotations

import numpy as np
import pytest

from probe.contrast import HeadScore, candidates, correlation, difference, rank_heads
from probe.errors import UsageError


@pytest.fixture
def two():
    """Two metrics [L, H] = [4, 5] with a zero that both share."""
    a, b = np.random.default_rng(0).normal(size=(2, 4, 5))
    a[0, 0] = b[0, 0] = 0
    return a, b


def z(values):
    values = np.asarray(values, float)
    mean = sum(values.flat) / values.size
    spread = (sum((v - mean) ** 2 for v in values.flat) / values.size) ** 0.5
    return np.array([[(v - mean) / spread for v in row] for row in values])


def test_each_difference_is_what_it_says(two):
    a, b = two
    assert np.array_equal(difference(a, b), a - b)
    relative = difference(a, b, "relative")
    assert relative[0, 0] == 0
    assert relative[1, 2] == pytest.approx((a[1, 2] - b[1, 2]) / ((abs(a[1, 2]) + abs(b[1, 2])) / 2))
    assert np.abs(relative).max() <= 2
    assert np.allclose(difference(a, b, "zscore"), z(a - b))


@pytest.mark.parametrize("mode", ["absolute", "relative", "zscore"])
def test_a_difference_flips_its_sign_and_is_zero_between_equals(two, mode):
    a, b = two
    assert np.allclose(difference(a, b, mode), -difference(b, a, mode))
    assert np.abs(difference(a, b, mode)).max() > 0.5
    assert not difference(a, a, mode).any()


def test_unknown_heads_stay_unknown_and_spoil_no_other(two):
    a, b = two
    holed = a.copy()
    holed[2, 3] = np.nan
    for mode in ("absolute", "relative", "zscore"):
        found = difference(holed, b, mode)
        assert np.argwhere(np.isnan(found)).tolist() == [[2, 3]]
    known = np.delete((a - b).ravel(), 13)
    assert difference(holed, b, "zscore")[0, 1] == pytest.approx(
        (a - b)[0, 1] / known.std() - known.mean() / known.std()
    )


def test_correlation_is_pearson(two):
    a, b = two
    assert correlation(a, b) == pytest.approx(np.corrcoef(a.ravel(), b.ravel())[0, 1])
    assert correlation(a, 3 - 2 * a) == pytest.approx(-1)
    assert np.isnan(correlation(a, np.ones_like(a)))


@pytest.mark.parametrize("compare", [difference, correlation])
def test_two_shapes_are_refused(compare):
    with pytest.raises(UsageError, match=r"must have one shape. Got \(2, 3\) and \(3, 2\)"):
        compare(np.ones((2, 3)), np.ones((3, 2)))


def test_heads_are_ranked_by_value():
    metric = np.array([[0.1, 0.9, np.nan], [0.9, -2.0, 0.5]])
    ranked = [
        HeadScore(0, 1, 0.9),
        HeadScore(1, 0, 0.9),
        HeadScore(1, 2, 0.5),
        HeadScore(0, 0, 0.1),
        HeadScore(1, 1, -2),
    ]
    assert rank_heads(metric, 3) == ranked[:3]
    assert rank_heads(metric, 99) == ranked
    assert rank_heads(metric, 0) == []
    with pytest.raises(UsageError, match=r"ranked by a metric \[L, H\]. Got \(2, 3, 1\)"):
        rank_heads(metric[..., None], 1)


def test_candidates_are_the_best_by_all_metrics_together(two):
    entropy, sink = two
    found = candidates({"entropy": entropy, "sink": sink}, {"entropy": -1, "sink": 1}, 3)
    score = (z(sink) - z(entropy)) / 2
    order = sorted(np.ndindex(4, 5), key=lambda at: score[at])
    assert np.allclose(found.score, score)
    assert [(h.layer, h.head) for h in found.heads] == order[:-4:-1]
    assert [(h.layer, h.head) for h in found.control] == order[:3]
    assert found.heads[0].value == pytest.approx(score.max())


def test_a_random_control_group_is_repeatable_and_apart(two):
    metrics, signs = {"sink": two[0]}, {"sink": 1.0}
    drawn = [{(h.layer, h.head) for h in candidates(metrics, signs, 5, seed).control} for seed in range(16)]
    chosen = {(h.layer, h.head) for h in candidates(metrics, signs, 5, 0).heads}
    assert all(len(group) == 5 and not group & chosen for group in drawn)
    assert len({frozenset(group) for group in drawn}) > 4
    assert set().union(*drawn, chosen) == set(np.ndindex(4, 5))
    assert candidates(metrics, signs, 5, 3).control == candidates(metrics, signs, 5, 3).control


def test_an_even_metric_makes_no_difference(two):
    metrics = {"sink": two[0], "even": np.full((4, 5), 0.3)}
    assert (
        candidates(metrics, {"sink": 1, "even": 1}, 4).heads[0].layer
        == candidates({"sink": two[0]}, {"sink": 1}, 4).heads[0].layer
    )
    assert np.allclose(candidates(metrics, {"sink": 1, "even": 1}, 4).score, z(two[0]) / 2)


@pytest.mark.parametrize("n", [0, 11])
def test_too_many_candidates_are_refused(two, n):
    with pytest.raises(UsageError, match=f"must be 1 to 10 heads each. Got {n}"):
        candidates({"sink": two[0]}, {"sink": 1}, n)


@pytest.mark.parametrize("signs", [{}, {"sink": 1, "entropy": 1}])
def test_a_metric_without_its_sign_is_refused(two, signs):
    with pytest.raises(UsageError, match="must have its sign. Got metrics sink"):
        candidates({"sink": two[0]}, signs, 2)
