import numpy as np
import pytest

from dashboards import figures
from probe.errors import UsageError


def test_a_word_map_has_a_panel_per_frame_on_one_scale_from_zero():
    lift = np.arange(24, dtype=np.float64).reshape(2, 3, 4)
    figure = figures.word_map(lift, "circle")
    assert len(figure.data) == 2
    for panel, frame in zip(figure.data, lift, strict=True):
        assert np.array_equal(panel.z, frame)
        assert panel.z.dtype == np.float32
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (0, 23)
    assert figure.layout.title.text == "circle"


def test_region_mass_shows_its_numbers_and_rows_without_tokens():
    table = np.array([[0.1, 0.2, 0.0, 0.7], [np.nan] * 4, [0.25, 0.25, 0.25, 0.25]])
    figure = figures.region_mass(table)
    assert figure.data[0].text[0][3] == "70.0%"
    assert list(figure.data[0].text[1]) == ["–"] * 4
    assert figure.layout.coloraxis.cmax == 1


def test_layers_by_heads():
    grid = np.eye(3)
    figure = figures.layers_by_heads(grid, "sink")
    assert np.array_equal(figure.data[0].z, grid)
    assert figure.layout.coloraxis.colorbar.title.text == "sink"
    assert figures.layers_by_heads(np.zeros((2, 2)), "none").layout.coloraxis.cmax == 1


def test_wrong_axes_are_refused():
    with pytest.raises(UsageError, match=r"from an array \[F, Y, X\]. Got \(2, 2\)"):
        figures.word_map(np.zeros((2, 2)))
