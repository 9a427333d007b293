"""Similarity of maps against the matrices themselves in float64."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import probe
from probe.likeness import MEASURES, similarity
from probe.readout.keep import KeepQK
from probe.readout.settling import Settling
from probe.readout.similarity import Similarity
from tests import tiny
from tests.oracle import weights
from tests.probe.readout import calls
from tests.probe.readout.calls import GRID, matrix, one_call

BOUND = {torch.float64: 1e-6, torch.float32: 5e-6, torch.bfloat16: 1e-4}  # results are kept in float32
LOGIT = 14.0  # the largest of the calls below
RUN_ROWS = (slice(tiny.TEXT, None), slice(0, tiny.TEXT))

A, B = probe.Branch(guided=True), probe.Branch(guided=False)


def batch(*calls, branches=(A, B)):
    """Batch entries of one call, from calls of one entry."""
    tensors = {name: torch.cat([getattr(call, name) for call in calls]) for name in "qkv"}
    visible = [call.visible for call in calls]
    joined = None if None in visible else tuple(seen for (seen,) in visible)
    return replace(calls[0], **tensors, branches=branches, visible=joined, mask=None)


def pair(**options):
    """Two entries that are half alike."""
    one, two = one_call(seed=0, **options), one_call(seed=1, **options)
    return one, replace(two, **{n: getattr(one, n) / 2 + getattr(two, n) / 2 for n in "qk"})


def slow(p, r, rows):
    """Means over rows of the three measures, one row at a time."""
    table = {name: np.full((len(p), len(rows)), np.nan) for name in MEASURES}
    for h in range(len(p)):
        for c, part in enumerate(rows):
            both = list(zip(p[h, part], r[h, part], strict=True))
            if both:
                table["bhattacharyya"][h, c] = np.mean([np.sqrt(x * y).sum() for x, y in both])
                cosines = [x @ y / np.sqrt((x @ x) * (y @ y)) for x, y in both]
                table["cosine"][h, c] = np.mean(cosines)
                table["kl"][h, c] = np.mean([(x * np.log(x / y)).sum() for x, y in both])
    return table


def kept_matrix(value):
    return weights(*(torch.from_numpy(value[name]) for name in "qk")).numpy()


def assert_close(got, expected, dtype):
    for name, table in expected.items():
        bound = LOGIT * 1e-3 if (name, dtype) == ("kl", torch.bfloat16) else BOUND[dtype]
        np.testing.assert_allclose(got[name], table, rtol=0, atol=bound, err_msg=name)


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("order", ["text-video", "video-text"])
@pytest.mark.parametrize("keys", ["all", "video"])
def test_similarity_of_two_branches_equals_the_matrices(dtype, order, keys):
    one, two = pair(dtype=dtype, order=order)
    readout = Similarity(measures=MEASURES, keys=keys)
    readout.serve(batch(one, two), (0, 1))
    p, r, video, text = matrix(one), matrix(two), one.layout.video_slice, one.layout.text_slice
    if keys == "video":
        p, r = (m[:, :, video] / m[:, :, video].sum(-1, keepdims=True) for m in (p, r))
        text = slice(0, 0)
    (value,) = readout.values.values()
    assert_close(value, slow(p, r, (video, text)), dtype)
    assert readout.at(branch=A)
    assert readout.other == {A: B}


@pytest.mark.parametrize("kind", ["self", "cross", "double", "single"])
def test_similarity_reads_every_kind_of_attention(kind):
    one, two = pair(kind=kind)
    readout = Similarity(measures=MEASURES)
    readout.serve(batch(one, two), (0, 1))
    parts = (slice(0, 24), slice(0, 0)) if kind in ("self", "cross") else (slice(7, 31), slice(0, 7))
    assert_close(next(iter(readout.values.values())), slow(matrix(one), matrix(two), parts), torch.float32)


def test_metrics_are_the_means_of_each_head():
    one, two = pair()
    for keys, names in (("all", {"kl_video": 0, "kl_text": 1}), ("video", {"kl_within_video": 0})):
        readout = Similarity(measures=("kl",), keys=keys)
        value = calls.value_of(readout, batch(one, two))
        metrics = readout.metrics(value)
        assert list(metrics) == list(readout.definitions) == [f"similarity_{name}" for name in names]
        for name, column in names.items():
            np.testing.assert_array_equal(metrics[f"similarity_{name}"], value["kl"][:, column])
    assert list(Settling().definitions) == ["settling_bhattacharyya_video", "settling_bhattacharyya_text"]


def test_equal_maps_are_equal():
    one = one_call(sharp=6.0)
    readout = Similarity(measures=MEASURES)
    readout.serve(batch(one, one), (0, 1))
    (value,) = readout.values.values()
    np.testing.assert_allclose(value["bhattacharyya"], 1, atol=1e-5)
    np.testing.assert_allclose(value["cosine"], 1, atol=1e-5)
    np.testing.assert_allclose(value["kl"], 0, atol=1e-5)


def test_texts_of_different_length_are_compared_on_the_video_only():
    one, two = pair(order="video-text", visible=29)
    two = replace(two, visible=(27,))
    with pytest.raises(probe.MmditError, match="same keys. Got 5 and 3 text tokens at step 0 layer 0. Compare with"):
        Similarity().serve(batch(one, two), (0, 1))
    readout = Similarity(measures=MEASURES, keys="video")
    readout.serve(batch(one, two), (0, 1))
    p, r = (matrix(call)[:, :24, :24] for call in (one, two))
    p, r = (m / m.sum(-1, keepdims=True) for m in (p, r))
    assert_close(next(iter(readout.values.values())), slow(p, r, (slice(0, 24), slice(0, 0))), torch.float32)


def test_several_are_compared_in_order_or_with_one():
    calls = [one_call(seed=seed) for seed in range(4)]
    branches = tuple(probe.Branch(prompt=n, guided=guided) for guided in (False, True) for n in (0, 1))
    call = batch(*calls, branches=branches)
    halves, first = Similarity(), Similarity(probe.Which(guided=True), lambda branch: branch == branches[2])
    for readout in (halves, first):
        readout.serve(call, (0, 1, 2, 3))
    assert halves.other == {branches[2]: branches[0], branches[3]: branches[1]}
    assert first.other == {branches[2]: branches[2], branches[3]: branches[2]}
    rows = (slice(7, 31), slice(0, 7))
    for readout, at, others in ((halves, 3, 1), (first, 3, 2)):
        (place,) = readout.at(branch=branches[at])
        expected = slow(matrix(calls[at]), matrix(calls[others]), rows)["bhattacharyya"]
        np.testing.assert_allclose(readout.values[place]["bhattacharyya"], expected, atol=5e-6)


def test_where_chooses_among_the_branches_of_both_sides():
    four = [one_call(seed=seed) for seed in range(4)]
    branches = tuple(probe.Branch(prompt=n, guided=guided) for guided in (False, True) for n in (0, 1))
    readout = Similarity(where=probe.Where(branches=probe.Which(prompt=1)))
    call = batch(*four, branches=branches)
    readout.serve(call, readout.where.rows(branches))
    assert readout.other == {branches[3]: branches[1]}
    assert [at.branch for at in readout.values] == [branches[3]]


def test_heads_can_be_chosen():
    one, two = pair()
    every, second = Similarity(), Similarity(where=probe.Where(heads=1))
    for readout in (every, second):
        readout.serve(batch(one, two), (0, 1))
    (a,), (b,) = every.values.values(), second.values.values()
    np.testing.assert_allclose(b["bhattacharyya"], a["bhattacharyya"][1:], rtol=1e-6)


def test_similarity_refuses_what_is_not_side_by_side():
    lockstep = "Similarity between runs or steps needs a lockstep batch or kept Q and K. Got a call with "
    with pytest.raises(probe.MmditError, match=f"{lockstep}1 entries of a and 0 of b at step 0 layer 0"):
        Similarity().serve(one_call(), (0,))
    one, two = pair()
    with pytest.raises(probe.MmditError, match="told apart by their branches. Got conditional prompt 0 .* more than"):
        Similarity(probe.Which(), probe.Which()).serve(batch(one, two, branches=(A, A)), (0, 1))
    with pytest.raises(probe.MmditError, match="must be some of bhattacharyya, cosine, kl. Got .'euclid'."):
        Similarity(measures=("euclid",))
    with pytest.raises(probe.MmditError, match="must be all or video. Got 'text'"):
        Similarity(keys="text")


def test_similarity_costs_its_attentions():
    layout = probe.TokenLayout("text-video", 10, probe.Grid(1, 3, 10))
    assert Similarity().cost(layout) == 1
    assert Similarity(measures=MEASURES).cost(layout) == 4
    assert Similarity(keys="video").cost(layout) == pytest.approx(2 * 0.75**2)
    assert Settling().cost(layout) == 2


@pytest.mark.parametrize("keys", ["all", "video"])
def test_kept_q_and_k_give_the_same_numbers(keys):
    one, two = pair(dtype=torch.bfloat16)
    call = batch(one, two)
    readout = Similarity(measures=MEASURES, keys=keys)
    keep = KeepQK([(0, 0)], where=probe.Where(branches=lambda branch: True))
    for handler in (readout, keep):
        handler.serve(call, (0, 1))
    kept = {at.branch: value for at, value in keep.values.items()}
    got = similarity(kept[A], kept[B], call.layout, keys=keys)
    assert_close(got, next(iter(readout.values.values())), torch.bfloat16)
    tensors = {name: torch.from_numpy(x).double() for name, x in kept[A].items()}
    itself = similarity(tensors, tensors, call.layout, keys=keys)
    np.testing.assert_allclose(itself["kl"][:, 0], 0, atol=1e-9)


def test_kept_maps_of_another_shape_are_refused():
    layout = probe.TokenLayout("text-video", 7, GRID)
    x, y = np.ones((2, 31, 4), np.float16), np.ones((2, 31, 8), np.float16)
    with pytest.raises(probe.MmditError, match="must have the same shapes. Got .2, 31, 4. and .2, 31, 4., .2, 31, 8."):
        similarity({"q": x, "k": x}, {"q": y, "k": y}, layout)
    with pytest.raises(probe.MmditError, match="must have the 31 rows of the maps.* Got 24"):
        similarity({"q": x, "k": x}, {"q": x, "k": x}, layout.with_text(0))
    with pytest.raises(probe.MmditError, match="and their 9 columns to choose the video. Got 31"):
        similarity({"q": x, "k": x[:, :9]}, {"q": x, "k": x[:, :9]}, layout, keys="video")


def sharp_pipeline():
    """One whose maps are far from uniform."""
    pipe = tiny.pipeline(rotary=True)
    for block in pipe.transformer.transformer_blocks:
        torch.nn.init.constant_(block.attn1.norm_q.weight, 3.0)
        torch.nn.init.ones_(block.attn1.norm_k.weight)
    return pipe


def test_similarity_of_prompts_in_a_run():
    """Two prompts in one batch against what the same run keeps, and no bit of the video changed."""
    pipe = sharp_pipeline()
    prompts = [tiny.PROMPT, tiny.OTHER]
    a, b = (probe.Which(prompt=n, guided=True) for n in (0, 1))
    readout, halves = Similarity(a, b, measures=MEASURES), Similarity()
    keep = KeepQK([(1, 0), (1, 2)], dtype=np.float32)
    seen = tiny.latents(probe.trace(pipe, readout, halves, keep), prompts, steps=2)
    assert torch.equal(seen, tiny.latents(pipe, prompts, steps=2))
    assert len(readout.values) == 2 * 3
    assert len(halves.values) == 2 * 3 * 2
    for layer in (0, 2):
        one, two = (kept_matrix(keep.values[at]) for at in keep.at(step=1, layer=layer))
        (at,) = readout.at(step=1, layer=layer)
        assert_close(readout.values[at], slow(one, two, RUN_ROWS), torch.float32)
        assert (readout.values[at]["kl"] > 1e-2).all()


def test_settling_compares_neighbouring_steps():
    readout = Settling(layers=[1], measures=MEASURES)
    keep = KeepQK([(step, 1) for step in range(3)], dtype=np.float32)
    tiny.latents(probe.trace(sharp_pipeline(), readout, keep), steps=3)
    assert [at.step for at in readout.values] == [1, 2]
    assert not readout._before  # the last step lets go of what it kept
    for at, value in readout.values.items():
        now, before = (kept_matrix(keep.values[keep.at(step=step)[0]]) for step in (at.step, at.step - 1))
        assert_close(value, slow(before, now, RUN_ROWS), torch.float32)
        assert (value["kl"] > 1e-3).all()


def test_settling_lets_go_of_turns_that_the_last_step_does_not_have():
    """Heun's method evaluates the model twice a step, and once in the last."""
    readout, call = Settling(), one_call()
    readout.begin((), 2, 1)
    for step, turn in ((0, 0), (0, 1), (1, 0)):
        readout.serve(replace(call, site=replace(call.site, step=step, turn=turn)), (0,))
    assert readout._before
    readout.end()
    assert not readout._before
    assert [(at.step, at.turn) for at in readout.values] == [(1, 0)]


def test_settling_compares_the_steps_that_are_selected():
    far, near = Settling(where=probe.Where(steps={0, 2})), Settling()
    tiny.latents(probe.trace(sharp_pipeline(), far, near), steps=3)
    assert {at.step for at in far.values} == {2}
    (a, *_), (b, *_) = far.values.values(), (near.values[at] for at in near.at(step=2))
    assert not np.allclose(a["bhattacharyya"], b["bhattacharyya"])
