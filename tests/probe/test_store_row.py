"""A row of the attention, from the query and key that were kept, against the whole matrix in float64."""

from __future__ import annotations

import numpy as np
import pytest

from probe.errors import StoreError, UsageError
from probe.store import Run, RunWriter
from probe.store_row import softmax_rows
from tests.probe.samples import GRID, record

VIDEO, TEXT, HEADS, WIDTH = 24, 4, 11, 16
ERROR = 5e-5  # of each probability, as softmax_rows states


def tensors(rows, columns, seed=0, size=1.0):
    rng = np.random.default_rng(seed)
    return [rng.normal(0, size, (HEADS, count, WIDTH)).astype(np.float32) for count in (rows, columns)]


def matrix(query, key, scale):
    """softmax(scale * Q K^T) in float64, of the tensors as float16 keeps them: [H, N, M]."""
    query, key = (np.asarray(array, np.float16).astype(np.float64) for array in (query, key))
    weights = np.exp(scale * query @ key.swapaxes(1, 2))
    return weights / weights.sum(-1, keepdims=True)


def kept(folder, query, key, kinds=(), **attrs):
    """A run with query and key of layer 4 in step 2."""
    with RunWriter.create(folder, {}, "") as writer:
        attrs = {"grid": list(GRID), **attrs}
        writer.write_step(2, {}, [record(qk={4: (query, key)}, attrs=attrs, kinds=kinds)])
    return Run(folder)


def flat(video, text, order):
    parts = (text, video.ravel()) if order == "text-video" else (video.ravel(), text)
    return np.concatenate(parts)


@pytest.mark.parametrize("scale", [None, 0.4])
@pytest.mark.parametrize("order", ["text-video", "video-text"])
def test_a_row_equals_the_row_of_the_matrix(tmp_path, order, scale):
    query, key = tensors(VIDEO + TEXT, VIDEO + TEXT)
    run = kept(tmp_path / "run", query, key, order=order, **({} if scale is None else {"scale": scale}))
    assert run.qk_sites == ((2, 4),)
    expected = matrix(query, key, scale or WIDTH**-0.5)
    first = TEXT if order == "text-video" else 0
    for patch, number in (((0, 0, 0), 0), ((1, 2, 3), 23), ((1, 0, 2), 14)):
        video, text = run.attention_row(4, 2, 7, token=patch)
        assert (video.shape, text.shape, video.dtype, text.dtype) == (GRID, (TEXT,), np.float32, np.float32)
        np.testing.assert_allclose(flat(video, text, order), expected[7, first + number], rtol=ERROR)
    token = 3 if order == "text-video" else VIDEO + 3
    video, text = run.attention_row(4, 2, 0, token=3)
    np.testing.assert_allclose(flat(video, text, order), expected[0, token], rtol=ERROR)


def test_without_a_head_it_is_the_mean_over_heads(tmp_path):
    query, key = tensors(VIDEO + TEXT, VIDEO + TEXT)
    run = kept(tmp_path / "run", query, key)
    video, text = run.attention_row(4, 2, token=(0, 1, 2))
    expected = matrix(query, key, WIDTH**-0.5)[:, TEXT + 6].mean(0)
    np.testing.assert_allclose(flat(video, text, "text-video"), expected, rtol=ERROR)
    assert video.sum(dtype=float) + text.sum(dtype=float) == pytest.approx(1, abs=1e-6)


def test_self_attention_has_no_text_and_cross_attention_no_video(tmp_path):
    query, key = tensors(VIDEO, VIDEO)
    video, text = kept(tmp_path / "self", query, key, ("joint", "self")).attention_row(4, 2, token=(1, 1, 1))
    np.testing.assert_allclose(video.ravel(), matrix(query, key, WIDTH**-0.5)[:, 17].mean(0), rtol=ERROR)
    assert text.size == 0
    query, key = tensors(VIDEO, 30)  # longer than the grid: only the kind of the layer tells
    video, text = kept(tmp_path / "cross", query, key, ("joint", "cross")).attention_row(4, 2, token=(1, 1, 1))
    np.testing.assert_allclose(text, matrix(query, key, WIDTH**-0.5)[:, 17].mean(0), rtol=ERROR)
    assert video.shape == GRID
    assert not video.any()


@pytest.mark.parametrize("size", [0.1, 1, 3.3])
def test_float32_is_within_its_stated_error_of_float64_up_to_steep_rows(size):
    rng = np.random.default_rng(1)
    query, key = (rng.normal(0, size, shape).astype(np.float16) for shape in ((2, 64), (2, 3000, 64)))
    logits = np.einsum("hd,hmd->hm", query.astype(float), key.astype(float)) / 8
    expected = np.exp(logits - logits.max(-1, keepdims=True))
    expected /= expected.sum(-1, keepdims=True)
    found = softmax_rows(query, key, 1 / 8)
    assert found.dtype == np.float32
    assert np.abs(logits).max() < 60
    np.testing.assert_allclose(found, expected, rtol=ERROR, atol=1e-30)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (
            {"token": (2, 0, 0)},
            "A patch must be (frame, row, column) in the grid 2x3x4. Got (2, 0, 0). Count each from",
        ),
        ({"token": (0, -1, 0)}, "A patch must be (frame, row, column) in the grid 2x3x4. Got (0, -1, 0)."),
        ({"token": (0, 0)}, "A patch must be (frame, row, column) in the grid 2x3x4. Got (0, 0)."),
        ({"token": 4}, "A text token must be a row of this attention. Got 4. It has 4 text tokens, counted from 0."),
        ({"token": -1}, "A text token must be a row of this attention. Got -1."),
        ({"token": 0, "head": 11}, "head must be one that was recorded. Got 11. Recorded: 0, 1, 2, 3"),
        ({"token": 0, "layer": 1}, "layer of query and key must be one that was recorded. Got 1. Recorded: 4."),
        ({"token": 0, "step": 0}, "step must be one that was recorded. Got 0. Recorded: 2."),
    ],
)
def test_a_row_that_is_not_there_is_said(tmp_path, call, said):
    run = kept(tmp_path / "run", *tensors(VIDEO + TEXT, VIDEO + TEXT))
    with pytest.raises(UsageError) as caught:
        run.attention_row(**({"layer": 4, "step": 2} | call))
    assert str(caught.value).startswith(said)


def test_a_text_row_of_a_video_alone_is_said(tmp_path):
    run = kept(tmp_path / "run", *tensors(VIDEO, VIDEO))
    with pytest.raises(UsageError, match="A text token must be a row of this attention. Got 0. It has rows of the vid"):
        run.attention_row(4, 2, token=0)


def test_tensors_that_do_not_cover_the_grid_are_said(tmp_path):
    run = kept(tmp_path / "run", *tensors(20, 20))
    with pytest.raises(
        UsageError, match="query and key must cover the grid 2x3x4 of their segment. Got 20 rows and 20"
    ):
        run.attention_row(4, 2, token=(0, 0, 0))


@pytest.mark.parametrize(("value", "said"), [(7e4, "70000"), (np.nan, "nan"), (-np.inf, "inf")])
def test_tensors_that_float16_cannot_hold_are_refused(tmp_path, value, said):
    query, key = tensors(VIDEO, VIDEO)
    key[3, 2, 1] = value
    with pytest.raises(StoreError, match=f"query and key must fit into float16, at most 65504. Got {said} in layer 4."):
        kept(tmp_path / "run", query, key)
