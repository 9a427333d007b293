"""Columns and sinks against the whole matrix in float64."""

import numpy as np
import pytest
import torch

import probe
from probe.entry import Entry
from probe.layout import Grid
from probe.readout.column import GROUPS, ColumnMass
from probe.readout.locality import Locality
from probe.readout.sink import PLACES, Sinks
from probe.transpose import column_sums
from tests.probe.readout import calls
from tests.probe.readout.calls import matrix, one_call, value_of, where

BOUND = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 2e-4, torch.float16: 2e-4}  # kept in float32
EVERY = calls.JOINT + calls.SELF + calls.CROSS


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("channels", [False, True])
def test_swapped_sums_equal_the_matrix_with_the_bias_as_argument_and_as_channels(dtype, channels):
    for sharp in (0.5, 8.0):
        call = one_call(dtype, sharp=sharp, dim=24)
        entry = call.entry(0)
        got = column_sums(entry.q, entry.k, entry.lse, entry.scale, channels).numpy()
        expected = matrix(call).sum(1)
        assert np.abs(got / expected - 1).max() < BOUND[dtype]


def test_half_precision_needs_more_than_one_channel():
    """The log-normaliser rounded to bfloat16 would be wrong in the second digit: the check above can see it."""
    call = one_call(torch.bfloat16, sharp=8.0, dim=24)
    entry = call.entry(0)
    rounded = column_sums(entry.q, entry.k, entry.lse.bfloat16().float(), entry.scale, True).numpy()
    assert np.abs(rounded / matrix(call).sum(1) - 1).max() > 5e-3


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("given", EVERY, ids=str)
def test_column_mass_equals_the_matrix(dtype, given):
    call, readout = one_call(dtype, **given), ColumnMass()
    value, p = value_of(readout, call), matrix(call)
    for g, name in enumerate(GROUPS):
        rows = list(range(p.shape[1])) if name == "all" else where(call, "rows", name)
        assert value["mass"][:, g].shape == p.shape[::2]
        if rows:
            assert np.abs(value["mass"][:, g] / p[:, rows].mean(1) - 1).max() < BOUND[dtype]
        else:
            assert np.isnan(value["mass"][:, g]).all()
    assert np.array_equal(readout.table(value), value["mass"][:, 0])


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("given", EVERY, ids=str)
def test_column_metrics_equal_the_matrix(dtype, given):
    call, readout = one_call(dtype, sharp=4.0, **given), ColumnMass()
    metrics, p = readout.metrics(value_of(readout, call)), matrix(call)
    c = p[:, where(call, "rows", "video")].mean(1)
    text = where(call, "columns", "text") + where(call, "columns", "padding")
    expected = {
        "sink_score": c.max(-1),
        "sink_mass": np.where(c * c.shape[-1] > 10, c, 0).sum(-1),
        "text_mass": c[:, text].sum(-1),
    }
    assert set(metrics) == set(readout.definitions) == set(expected)
    for name, heads in expected.items():
        assert metrics[name] == pytest.approx(heads, abs=BOUND[dtype], nan_ok=True)


def test_column_sums_of_video_rows_are_made_once_for_an_entry(monkeypatch):
    count, call = [], one_call()
    monkeypatch.setattr("probe.entry.column_sums", lambda *a: count.append(1) or column_sums(*a))
    value_of(Sinks(), call)
    value_of(Locality(), call)
    assert len(count) == 1
    value_of(ColumnMass(), call)
    assert len(count) == 3  # the text and the padding rows
    call.rebind(k=call.k * 2)
    again = call.entry(0).video_columns.numpy()
    assert len(count) == 4
    video = call.layout.video_slice
    assert np.abs(again - matrix(call)[:, video].mean(1)).max() < 1e-6


def with_sinks(dtype=torch.float32, keys=((2, 9), (40,)), lift=14.0, **given):
    """A call in which head h looks at keys[h] most, by a direction that all rows share; the last head at none."""
    call = one_call(dtype, grid=Grid(3, 4, 5), heads=len(keys) + 1, sharp=1.0, **given)
    q, k = call.q.clone(), call.k.clone()
    q[..., 0] = 4.0
    k[..., 0] = 0.0
    for head, columns in enumerate(keys):
        k[:, head, list(columns), 0] = lift / 4.0
    call.rebind(q=q, k=k)
    return call


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("given", [{}, {"order": "video-text"}, {"order": "video-text", "visible": 64}], ids=str)
def test_sinks_equal_the_matrix(dtype, given):
    call = with_sinks(dtype, **given)
    readout = Sinks(tau=8.0)
    value, p = value_of(readout, call), matrix(call)
    rows = where(call, "rows", "video")
    keys = p.shape[-1]
    c = p[:, rows].mean(1)
    assert np.abs(value["enrichment"] - np.sort(c)[:, ::-1][:, :16] * keys).max() < keys * BOUND[dtype]
    assert value["count"].tolist() == [2, 1, 0]
    sinks = [{2, 9}, {40}, set()]
    v, k = (x[0].double().numpy()[:, :keys] for x in (call.v, call.k))
    half = 1e-2 if dtype in (torch.bfloat16, torch.float16) else 1e-5
    for head, inside in enumerate(sinks):
        count = len(inside)
        assert set(value["columns"][head, :count].tolist()) == inside
        for x, name in ((v, "value"), (k, "key")):
            norms = np.linalg.norm(x[head], axis=-1)
            ratio = norms / np.sort(norms)[(keys - 1) // 2]
            assert np.abs(value[f"{name}_norm"][head] - ratio[value["columns"][head]]).max() < half
            if inside:
                assert abs(value[f"{name}_ratio"][head] - ratio[list(inside)].mean()) < half
        removed, zeroed = slow_inertness(p[head, rows], v[head], inside)
        if inside:
            assert abs(value["removed"][head] - removed) < half
            assert abs(value["zeroed"][head] - zeroed) < half
            assert removed > 0.05
            assert zeroed > 0.05
        else:
            assert np.isnan([value["removed"][head], value["zeroed"][head], value["value_ratio"][head]]).all()


def slow_inertness(p, v, inside):
    keep = np.array([j not in inside for j in range(p.shape[1])])
    out = p @ v
    rest = (p * keep) / (p * keep).sum(-1, keepdims=True) @ v
    return tuple(np.linalg.norm(other - out) / np.linalg.norm(out) for other in (rest, (p * keep) @ v))


def test_sink_mass_of_the_columns_is_the_mass_of_the_sink_set():
    call, readout = with_sinks(), ColumnMass()
    metrics, c = readout.metrics(value_of(readout, call)), matrix(call)[:, where(call, "rows", "video")].mean(1)
    assert (c * c.shape[-1] > 10).sum(-1).tolist() == [2, 1, 0]
    assert metrics["sink_mass"] == pytest.approx([c[0, 2] + c[0, 9], c[1, 40], 0], abs=1e-5)


def test_places_of_sinks_are_counted():
    """Text 0 to 4, padding 5 and 6, then frames of 4 x 5: 33 is inside the second one, 32 on its left border."""
    call, readout = with_sinks(keys=((0, 1, 5), (7, 33), (26, 32))), Sinks(tau=3.0)
    value = value_of(readout, call)
    assert value["count"].tolist() == [3, 2, 2, 0]
    assert dict(zip(PLACES, value["places"].T.tolist(), strict=True)) == {
        "text": [2, 0, 0, 0],
        "first_token": [1, 0, 0, 0],
        "padding": [1, 0, 0, 0],
        "first_frame": [0, 1, 1, 0],
        "border": [0, 1, 2, 0],
    }
    metrics = readout.metrics(value)
    assert set(metrics) == set(readout.definitions)
    assert metrics["sinks_border"].tolist() == [0, 1, 2, 0]
    assert metrics["sink_count"].tolist() == [3, 2, 2, 0]
    assert np.array_equal(metrics["sink_removed"], value["removed"], equal_nan=True)


def test_the_absolute_convention_counts_mass_and_not_enrichment():
    call = with_sinks(keys=((2, 9), (40,)))
    c = matrix(call)[:, call.layout.video_slice].mean(1)
    assert "c_j > 0.3" in Sinks(eps=0.3).definitions["sink_count"]
    assert "c_j N > 10" in Sinks().definitions["sink_count"]
    assert value_of(Sinks(eps=0.3), call)["count"].tolist() == (c > 0.3).sum(-1).tolist()
    assert value_of(Sinks(tau=1.0), call)["count"].tolist() == (c * c.shape[-1] > 1).sum(-1).tolist()


def test_a_head_whose_every_key_is_a_sink_loses_its_whole_output():
    value = value_of(Sinks(eps=1e-9), one_call(kind="self", sharp=0.5))
    assert value["removed"].tolist() == pytest.approx([1, 1])
    assert value["zeroed"].tolist() == pytest.approx([1, 1])


def test_heads_without_sinks_cost_no_further_call(monkeypatch):
    call, entry_call = one_call(sharp=0.1), []
    call.lse()
    monkeypatch.setattr("probe.readout.sink.attend.partial", lambda *a, **k: entry_call.append(1))
    monkeypatch.setattr(Entry, "video_columns", torch.full((2, 31), 1 / 31))
    assert np.isnan(value_of(Sinks(), call)["removed"]).all()
    assert not entry_call


def test_predicted_cost_is_that_of_the_swapped_call_and_the_complement():
    layout = one_call().layout
    assert ColumnMass().cost(layout) == 1
    assert Sinks().cost(layout) == 2


@pytest.mark.parametrize("wrong", [{"tau": 0.5}, {"eps": 1.5}, {"eps": 0.0}, {"most": 0}])
def test_senseless_sinks_are_refused(wrong):
    with pytest.raises(probe.MmditError, match="Sinks must have tau >= 1"):
        Sinks(**wrong)
