"""Frame mass and region mass against the whole matrix in float64."""

import numpy as np
import pytest
import torch

import probe
from probe.layout import Grid
from probe.readout.frame import FrameMass
from probe.readout.mass import RegionMass
from tests.probe.readout import calls

BOUND = {torch.float64: 1e-7, torch.float32: 1e-6, torch.bfloat16: 5e-5, torch.float16: 5e-5}  # kept in float32


def slow(call, conditional=False):
    """One row at a time, [H, F, F + 1] or [H, F, F]."""
    p, frames = calls.matrix(call), range(call.layout.grid.frames)
    text = calls.where(call, "columns", "text") + calls.where(call, "columns", "padding")
    parts = [calls.where(call, "columns", "video", g) for g in frames]
    parts += [text] if text and not conditional else []
    found = np.zeros((p.shape[0], len(frames), len(parts)))
    for h in range(p.shape[0]):
        for f in frames:
            rows = calls.where(call, "rows", "video", f)
            for i in rows:
                mass = np.array([sum(p[h, i, j] for j in part) for part in parts])
                found[h, f] += mass / (mass.sum() if conditional else 1) / len(rows)
    return found


@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("given", calls.JOINT + calls.SELF, ids=str)
@pytest.mark.parametrize("dtype", BOUND)
def test_frame_mass_equals_the_matrix(dtype, given, conditional):
    call = calls.one_call(dtype, **given)
    table = calls.value_of(FrameMass(video_conditional=conditional), call)
    assert table.shape == (2, 3, 3 if conditional or given in calls.SELF else 4)
    assert table.dtype == np.float32
    assert np.abs(table - slow(call, conditional)).max() < BOUND[dtype]
    assert np.allclose(table.sum(-1), 1, atol=1e-6 if dtype in (torch.float32, torch.float64) else 5e-5)


def test_heads_are_chosen():
    call = calls.one_call(heads=3)
    table = calls.value_of(FrameMass(where=probe.Where(heads={0, 2})), call)
    assert np.abs(table - slow(call)[[0, 2]]).max() < 1e-6


def test_a_picture_is_one_frame():
    call = calls.one_call(grid=Grid(1, 3, 4))
    readout = FrameMass()
    table = calls.value_of(readout, call)
    assert table.shape == (2, 1, 2)
    assert np.abs(table - slow(call)).max() < 1e-6
    metrics = readout.metrics(table)
    assert np.allclose(metrics["self_frame_mass"] + metrics["text_mass"], 1, atol=1e-6)
    assert np.isnan(metrics["frame_causality"]).all()


def test_uniform_attention_gives_each_frame_its_share_of_keys():
    call = calls.one_call()
    call.rebind(q=call.q * 0)
    assert np.allclose(calls.value_of(FrameMass(), call)[..., :3], 8 / 31, atol=1e-6)


@pytest.mark.parametrize("conditional", [False, True])
def test_metrics_are_what_their_definitions_name(conditional):
    call, readout = calls.one_call(grid=Grid(4, 2, 3)), FrameMass(video_conditional=conditional)
    metrics, t = readout.metrics(calls.value_of(readout, call)), slow(call, conditional)
    pairs = [(f, g) for f in range(4) for g in range(4)]
    past, future = (sum(t[:, f, g] for f, g in pairs if sign * (f - g) > 0) for sign in (1, -1))
    profile = [np.mean([t[:, f, g] for f, g in pairs if abs(f - g) == d], 0) for d in (1, 2, 3)]
    expected = {
        "self_frame_mass": np.mean([t[:, f, f] for f in range(4)], 0),
        "first_frame_mass": np.mean([t[:, f, 0] for f in range(1, 4)], 0),
        "frame_causality": (past - future) / (past + future),
        "frame_decay": -np.polyfit([1, 2, 3], np.log(profile), 1)[0],
    }
    if conditional:
        expected = {f"{name}_given_video": number for name, number in expected.items()}
    else:
        expected["text_mass"] = t[:, :, 4].mean(1)
    assert list(metrics) == list(readout.definitions) == list(expected)
    for name, heads in metrics.items():
        assert heads.dtype == np.float32
        assert np.allclose(heads, expected[name], atol=1e-5)


def test_self_attention_has_no_text_mass():
    readout = FrameMass()
    table = calls.value_of(readout, calls.one_call(kind="self"))
    assert np.isnan(readout.metrics(table)["text_mass"]).all()
    assert not np.isnan(readout.metrics(table)["self_frame_mass"]).any()


def test_cross_attention_is_refused():
    with pytest.raises(probe.MmditError, match="must select attention of a kind it can read. Got FrameMass"):
        probe.Plan([FrameMass()], 1, 1, kinds={"cross"})


def slow_regions(call):
    """One row, one column at a time."""
    p, table = calls.matrix(call), np.full((2, 3, 4), np.nan)
    columns = calls.tokens(call, "columns")
    for r, group in enumerate(("text", "padding", "video")):
        rows = calls.where(call, "rows", group)
        table[:, r] = 0 if rows else np.nan
        for i in rows:
            frame = calls.tokens(call, "rows")[i][1]
            for j, (kind, at) in enumerate(columns):
                own = group == "video" and at == frame
                c = {"text": 0, "padding": 1, "video": 2 if own else 3}[kind]
                table[:, r, c] += p[:, i, j] / len(rows)
    return table


@pytest.mark.parametrize("given", calls.JOINT + calls.CROSS, ids=str)
@pytest.mark.parametrize("dtype", BOUND)
def test_region_mass_equals_the_matrix(dtype, given):
    call, readout = calls.one_call(dtype, **given), RegionMass()
    table, expected = calls.value_of(readout, call), slow_regions(call)
    assert np.array_equal(np.isnan(table), np.isnan(expected))
    assert np.nanmax(np.abs(table - expected)) < 2 * BOUND[dtype]
    metrics = readout.metrics(table)
    assert list(metrics) == list(readout.definitions)
    assert np.array_equal(metrics["video_to_padding"], table[:, 2, 1])
    assert np.array_equal(metrics["text_to_video"], table[:, 0, 3], equal_nan=True)
