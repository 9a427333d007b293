"""Searches with planted answers."""

import itertools

import numpy as np
import pytest

from control.search import ablation, greedy, head_candidates, interaction, vitality
from probe.errors import UsageError

HEADS = [(layer, head) for layer in range(3) for head in range(4)]


def test_greedy_finds_the_planted_heads_and_scores_each_set_once():
    worth = {(1, 2): 3.0, (0, 3): 2.0, (2, 0): 1.5}
    asked = []

    def score(chosen):
        asked.append(chosen)
        return sum(worth.get(head, 0.0) for head in chosen)

    found = greedy(HEADS, score, rounds=3, keep=1)
    assert found.chosen == ((1, 2), (0, 3), (2, 0))
    assert len(asked) == len(set(asked)) == 12 + 11 + 10
    assert found.rounds[1][2, 0] == 3 + 1.5
    assert greedy(HEADS, score, rounds=1, keep=2).chosen == ((1, 2), (0, 3))


def test_greedy_scores_candidates_beside_what_is_chosen():
    """b is the better one alone, c beside a: after a, c is chosen."""
    scores = {"a": 3.0, "b": 2.0, "c": 1.0, "ab": 3.0, "ac": 5.0, "bc": 0.0}
    found = greedy("abc", lambda chosen: scores["".join(sorted(chosen))], rounds=2)
    assert found.chosen == ("a", "c")
    assert greedy("abc", lambda chosen: 1.0, rounds=1, keep=2).chosen == ("a", "b")


def test_greedy_refuses_what_it_cannot_choose():
    for candidates, rounds, keep in (("ab", 3, 1), ("ab", 0, 1), ("aab", 1, 1), ("ab", 1, 0)):
        with pytest.raises(UsageError, match="different candidates"):
            greedy(candidates, lambda chosen: 1.0, rounds, keep)
    with pytest.raises(UsageError, match="finite number. Got nan for a"):
        greedy("ab", lambda chosen: float("nan"))


def test_vitality_is_one_minus_the_mean_similarity():
    """Outputs are unit vectors turned by a planted angle for each layer and prompt."""
    turn = {None: (0.0, 0.0), 0: (0.1, 0.3), 1: (1.0, 1.2), 2: (0.0, 0.0)}
    outputs = {layer: [np.array([np.cos(a), np.sin(a)]) for a in angles] for layer, angles in turn.items()}
    found = vitality((0, 1, 2), outputs.__getitem__, lambda a, b: float(a @ b))
    assert found == pytest.approx({k: 1 - np.cos(v).mean() for k, v in turn.items() if k is not None})
    assert max(found, key=found.get) == 1
    with pytest.raises(UsageError, match="as many outputs as the plain one. Got 1 without layer 0, and 2 plain"):
        vitality([0], lambda layer: [1, 2] if layer is None else [1], lambda a, b: 1.0)


def test_ablation_is_the_relative_change():
    parts = {"a": np.array([3.0, 0.0]), "b": np.array([0.0, 4.0]), "c": np.array([0.0, 0.0])}

    def predict(without):
        return sum((part for name, part in parts.items() if name not in without), np.zeros(2))

    assert ablation(parts, predict) == pytest.approx({"a": 3 / 5, "b": 4 / 5, "c": 0})
    with pytest.raises(UsageError, match="must not be all zeros"):
        ablation("a", lambda without: np.zeros(3))


def test_interaction_tells_backups_from_parts_of_one_path():
    """a and b each suffice; c and d are both needed."""

    def predict(without):
        one = 2.0 if {"a", "b"} - set(without) else 0.0
        other = 1.0 if not {"c", "d"} & set(without) else 0.0
        return np.array([10.0, one + other])

    norm = np.linalg.norm([10.0, 3.0])
    found = interaction("abcd", predict)
    assert found["a", "b"] == pytest.approx(2 / norm)
    assert found["c", "d"] == pytest.approx(-1 / norm)
    assert found["a", "c"] == pytest.approx(0)
    assert set(found) == set(itertools.combinations("abcd", 2))


def planted(layers=4, heads=6, chosen=((0, 5), (2, 1), (3, 3)), seed=0):
    rng = np.random.default_rng(seed)
    metrics = {"temporal": rng.normal(size=(layers, heads)), "entropy": rng.normal(size=(layers, heads)) * 100}
    for at in chosen:
        metrics["temporal"][at] += 6
        metrics["entropy"][at] -= 600
    return metrics


def test_head_candidates_finds_the_planted_heads_whatever_the_scales():
    metrics = planted()
    found = head_candidates(metrics, 3, weights={"entropy": -1})
    assert set(found.heads) == {(0, 5), (2, 1), (3, 3)}
    z = [(one - one.mean()) / one.std() for one in metrics.values()]
    assert np.allclose(found.scores, z[0] - z[1])
    order = sorted(np.ndindex(4, 6), key=lambda at: found.scores[at])
    assert set(found.control) == set(order[:3])
    assert [found.scores[at] for at in found.heads] == sorted((found.scores[at] for at in found.heads), reverse=True)


def test_a_random_control_group_is_drawn_from_the_other_heads():
    groups = [head_candidates(planted(), 3, {"entropy": -1}, "random", seed) for seed in (1, 1, 2)]
    assert groups[0].control == groups[1].control != groups[2].control
    for found in groups:
        assert len({*found.heads, *found.control}) == 6


def test_heads_that_were_not_measured_are_never_chosen():
    metrics = planted()
    metrics["temporal"][2] = np.nan
    found = head_candidates(metrics | {"constant": np.ones((4, 6))}, 9, {"entropy": -1})
    assert {(0, 5), (3, 3)} < set(found.heads)
    assert not {layer for layer, _ in found.heads + found.control} & {2}
    with pytest.raises(UsageError, match="at most all 18 measured heads. Got 10 of each"):
        head_candidates(metrics, 10)


def test_what_does_not_fit_is_refused():
    for metrics, weights in (({}, {}), ({"a": np.ones(3)}, {}), (planted(), {"mass": 1.0})):
        with pytest.raises(UsageError, match="arrays \\[layers, heads\\] of one shape"):
            head_candidates(metrics, 1, weights)
    with pytest.raises(UsageError, match="arrays \\[layers, heads\\]"):
        head_candidates({"a": np.ones((2, 3)), "b": np.ones((3, 2))}, 1)
    with pytest.raises(UsageError, match="lowest or random. Got 'worst'"):
        head_candidates(planted(), 1, control="worst")
