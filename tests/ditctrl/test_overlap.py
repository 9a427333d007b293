"""Numbers of the authors' code: weights, weight sums, conditions."""

import pytest
import torch

from ditctrl.condition import conditions
from ditctrl.overlap import blend, triangle
from ditctrl.segment import Segments


def test_the_triangle_of_13_frames():
    assert torch.allclose(
        triangle(13) * 13, torch.tensor([1.0, 3, 5, 7, 9, 11, 13, 11, 9, 7, 5, 3, 1], dtype=torch.float64)
    )


@pytest.mark.parametrize(
    ("transitions", "sums"),
    [
        (2, [0.077, 0.231, 0.385, 0.538, 0.846, 1.308, 1.769, 1.923, 2.231, 2.692, 3.154, 3.000, 2.923]),
        (1, [0.077, 0.231, 0.385, 0.538, 0.692, 0.846, 1, 1, 1.154, 1.308, 1.462, 1.615, 1.769, 2.000]),
    ],
)
def test_weight_sums_with_multiplicity(transitions, sums):
    segments = Segments.scaled(2, 13, transitions)
    weights = torch.zeros(segments.frames, dtype=torch.float64)
    for k in range(segments.count):
        weights[segments.window(k)] += segments.multiplicity(k) * triangle(13)
    assert torch.allclose(weights[: len(sums)], torch.tensor(sums, dtype=torch.float64), atol=6e-4)
    assert torch.allclose(weights, weights.flip(0))


def test_blend_is_a_weighted_mean_of_what_covers_a_frame():
    segments = Segments(2, 5, 3, 0)
    a, b = torch.full((5, 1, 2, 2), 1.0), torch.full((5, 1, 2, 2), 3.0)
    long = blend(segments, [(0, 1.0, a), (1, 2.0, b)])[0, :, 0, 0, 0]
    w = triangle(5)
    middle = [(w[j + 2] * 1 + 2 * w[j] * 3) / (w[j + 2] + 2 * w[j]) for j in range(3)]
    assert torch.allclose(long.double(), torch.tensor([1, 1, *middle, 3, 3], dtype=torch.float64))


def test_equal_predictions_blend_to_themselves():
    segments = Segments(3, 5, 3, 1)
    whole = torch.randn(segments.frames, 2, 3, 3, dtype=torch.float64)
    parts = [(k, float(segments.multiplicity(k)), whole[segments.window(k)]) for k in range(segments.count)]
    assert torch.allclose(blend(segments, parts)[0], whole, atol=1e-14)


def test_transition_conditions_are_interpolated():
    e = torch.tensor([0.0, 3.0, 9.0]).view(3, 1, 1)
    assert conditions(Segments(3, 13, 9, 2), e).flatten().tolist() == [0, 1, 2, 3, 5, 7, 9]
    assert conditions(Segments(2, 13, 6, 1), e[:2]).flatten().tolist() == [0, 1.5, 3]
