"""Entropy and row log-normaliser against the whole matrix in float64."""

import math

import numpy as np
import pytest
import torch

import probe
from probe.layout import Grid
from probe.readout.entropy import Entropy, LogNormaliser
from tests.probe.readout import calls

BOUND = {torch.float64: 1e-6, torch.float32: 5e-5, torch.bfloat16: 8e-2, torch.float16: 1e-2}  # kept in float32
GROUPS = ("text", "padding", "video")


def slow_numbers(call, conditional=False):
    """Of every row: name -> [H, N]."""
    p = calls.matrix(call)
    if conditional:
        p = p[:, :, calls.where(call, "columns", "video")]
        p = p / p.sum(-1, keepdims=True)
    entropy = -(p * np.log(p)).sum(-1)
    return {
        "entropy": entropy,
        "normalised_entropy": entropy / math.log(p.shape[-1]),
        "effective_keys": np.exp(entropy),
        "participation": 1 / (p * p).sum(-1),
    }


def slow_summary(call, numbers):
    """[H, groups, statistics]."""
    found = np.full((len(numbers), 3, 5), np.nan)
    for g, group in enumerate(GROUPS):
        inside = numbers[:, calls.where(call, "rows", group)]
        if inside.shape[1]:
            found[:, g] = np.stack([inside.mean(1), inside.std(1), *np.percentile(inside, (10, 50, 90), axis=1)], -1)
    return found


@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("given", calls.JOINT + calls.SELF, ids=str)
@pytest.mark.parametrize("dtype", BOUND)
def test_entropy_equals_the_matrix(dtype, given, conditional):
    call = calls.one_call(dtype, **given)
    value = calls.value_of(Entropy(video_conditional=conditional, rows=True), call)
    expected = slow_numbers(call, conditional)
    assert set(value) == {*expected, "rows"}
    for name, numbers in expected.items():
        summary = slow_summary(call, numbers)
        assert value[name].dtype == np.float32
        assert value[name].shape == (2, 3, 5)
        assert np.array_equal(np.isnan(value[name]), np.isnan(summary))
        assert (np.abs(value[name] - summary) / np.maximum(summary, 1))[~np.isnan(summary)].max() < BOUND[dtype]
    video = expected["entropy"][:, calls.where(call, "rows", "video")].reshape(2, 3, 2, 4)
    assert np.abs(value["rows"] - video).max() < BOUND[dtype]


@pytest.mark.parametrize("given", calls.CROSS, ids=str)
def test_entropy_of_cross_attention_is_over_the_text(given):
    call = calls.one_call(**given)
    value = calls.value_of(Entropy(), call)
    assert np.allclose(value["entropy"][:, 2, 0], slow_numbers(call)["entropy"].mean(1), atol=1e-5)
    assert np.isnan(value["entropy"][:, :2]).all()
    with pytest.raises(probe.MmditError, match="must select attention of a kind it can read. Got Entropy"):
        probe.Plan([Entropy(video_conditional=True)], 1, 1, kinds={"cross"})


def test_uniform_attention_has_the_entropy_of_all_keys():
    call = calls.one_call()
    call.rebind(q=call.q * 0)
    value = calls.value_of(Entropy(), call)
    every = {"entropy": math.log(31), "normalised_entropy": 1, "effective_keys": 31, "participation": 31}
    for name, number in every.items():
        assert np.allclose(value[name], [number, 0, number, number, number], rtol=1e-5, atol=1e-5)


def test_a_row_that_sees_one_key_has_entropy_zero():
    """Rounding never makes it negative, or the keys fewer than one."""
    call = calls.one_call(torch.bfloat16, sharp=60.0)
    value = calls.value_of(Entropy(rows=True), call)
    assert value["rows"].min() == 0
    assert value["effective_keys"][..., 2:].min() >= 1
    assert value["participation"][..., 2:].min() >= 1


def test_heads_are_chosen():
    call = calls.one_call(heads=3)
    value = calls.value_of(Entropy(where=probe.Where(heads=1)), call)
    assert np.allclose(value["entropy"][0, 2, 0], slow_numbers(call)["entropy"][1, 7:].mean(), atol=1e-5)


def test_only_the_rows_asked_for_are_kept():
    assert "rows" not in calls.value_of(Entropy(), calls.one_call())
    assert set(calls.value_of(LogNormaliser(), calls.one_call())) == {"lse"}


@pytest.mark.parametrize("conditional", [False, True])
def test_metrics_are_what_their_definitions_name(conditional):
    call, readout = calls.one_call(), Entropy(video_conditional=conditional)
    metrics = readout.metrics(calls.value_of(readout, call))
    assert list(metrics) == list(readout.definitions)
    end = "_given_video" if conditional else ""
    for name, numbers in slow_numbers(call, conditional).items():
        for group in ("video", "text"):
            expected = numbers[:, calls.where(call, "rows", group)].mean(1)
            assert np.allclose(metrics[f"{name}_{group}{end}"], expected, rtol=1e-4)
            assert group in readout.definitions[f"{name}_{group}{end}"]


def test_entropy_costs_two_attentions():
    layout = probe.TokenLayout("text-video", 7, Grid(3, 2, 4))
    assert Entropy().cost(layout) == 2
    assert Entropy(video_conditional=True).cost(layout) == pytest.approx(2 * 24 / 31)
    assert LogNormaliser().cost(layout) == 0


@pytest.mark.parametrize("given", calls.JOINT + calls.SELF + calls.CROSS, ids=str)
@pytest.mark.parametrize("dtype", BOUND)
def test_log_normaliser_equals_the_logits(dtype, given):
    call = calls.one_call(dtype, **given)
    readout = LogNormaliser(rows=True)
    value = calls.value_of(readout, call)
    seen = len(calls.tokens(call, "columns"))
    q, k = (x[0].double().numpy() for x in (call.q, call.k[:, :, :seen]))
    numbers = np.log(np.exp(q @ k.swapaxes(-1, -2) / 4).sum(-1))[:, : len(calls.tokens(call, "rows"))]
    expected = slow_summary(call, numbers)
    bound = 5e-5 if dtype in (torch.bfloat16, torch.float16) else 5e-6
    assert np.array_equal(np.isnan(value["lse"]), np.isnan(expected))
    assert np.nanmax(np.abs(value["lse"] - expected)) < bound
    video = numbers[:, calls.where(call, "rows", "video")].reshape(2, 3, 2, 4)
    assert np.abs(value["rows"] - video).max() < bound
    metrics = readout.metrics(value)
    assert list(metrics) == list(readout.definitions)
    assert np.array_equal(metrics["lse_video"], value["lse"][:, 2, 0])


def test_participation_can_be_spared():
    whole, spared = Entropy(), Entropy(participation=False)
    made, less = (calls.value_of(readout, calls.one_call()) for readout in (whole, spared))
    assert set(made) - set(less) == {"participation"}
    assert np.array_equal(made["entropy"], less["entropy"], equal_nan=True)
    assert set(spared.metrics(less)) == set(spared.definitions)
    assert spared.cost(calls.one_call().layout) == whole.cost(calls.one_call().layout) / 2
