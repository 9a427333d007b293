"""Locality and recovery against the whole matrix in float64, one pair of tokens at a time."""

import numpy as np
import pytest
import torch

import probe
from probe import measure
from probe.layout import Grid, TokenLayout
from probe.readout import sample
from probe.readout.locality import AXES, BANDS, Locality
from probe.readout.recovery import Recovery
from tests.probe.readout import calls
from tests.probe.readout.calls import matrix, one_call, value_of, where

BOUND = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 2e-4, torch.float16: 2e-4}  # kept in float32
TABLES = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 2e-3, torch.float16: 2e-3}
GRID = Grid(3, 3, 4)
EVERY = [{}, {"order": "video-text"}, {"order": "video-text", "visible": 41}, *calls.SELF]


def places(call):
    """(frame, row, column) of each video token, in order."""
    return list(np.ndindex(call.layout.grid.shape))


def pairs(call):
    """The video rows by video columns of the matrix, joint, [H, V, V]."""
    return matrix(call)[:, where(call, "rows", "video")][..., where(call, "columns", "video")]


def slow_tables(call):
    p, shape = pairs(call), call.layout.grid.shape
    p = p / p.sum(-1, keepdims=True)
    tables = [np.zeros((len(p), n, n)) for n in shape]
    for i, here in enumerate(places(call)):
        for j, there in enumerate(places(call)):
            for axis, table in enumerate(tables):
                table[:, here[axis], there[axis]] += p[:, i, j] * shape[axis] / len(places(call))
    return dict(zip(AXES, tables, strict=True))


def in_band(here, there, band, radius):
    if band == "spatial":
        return here[0] == there[0]
    return here[0] != there[0] and max(abs(a - b) for a, b in zip(here[1:], there[1:], strict=True)) <= radius


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("given", EVERY, ids=str)
@pytest.mark.parametrize("dim", [8, 16])
def test_tables_equal_the_matrix(dtype, given, dim):
    """10 places on the axes: two groups of one-hot values at head width 8, one at 16."""
    call = one_call(dtype, grid=GRID, dim=dim, **given)
    value = value_of(Locality(), call)
    for axis, table in slow_tables(call).items():
        assert np.abs(value[axis] - table).max() < TABLES[dtype]


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("given", EVERY, ids=str)
@pytest.mark.parametrize("radius", [0, 1])
def test_bands_equal_the_matrix(dtype, given, radius):
    call = one_call(dtype, grid=GRID, **given)
    value, p = value_of(Locality(radius=radius), call), pairs(call)
    keys = len(calls.tokens(call, "columns"))
    for b, band in enumerate(BANDS[:2]):
        mask = np.array([[in_band(here, there, band, radius) for there in places(call)] for here in places(call)])
        assert np.abs(value["bands"][:, b] - (p * mask).sum(-1).mean(1)).max() < BOUND[dtype]
        assert value["uniform"][:, b] == pytest.approx(mask.sum(1).mean() / keys, rel=1e-6)
    assert np.abs(value["bands"][:, 2] - (1 - p.sum(-1)).mean(1)).max() < BOUND[dtype]
    assert value["uniform"][:, 2] == pytest.approx(1 - len(places(call)) / keys, abs=1e-6)


def test_sink_mass_is_that_of_the_columns():
    call = one_call(grid=GRID, sharp=1.0)
    q, k = call.q.clone(), call.k.clone()
    q[..., 0], k[..., 0] = 4.0, 0.0
    k[:, 1, 30, 0] = 5.0
    call.rebind(q=q, k=k)
    c = matrix(call)[:, where(call, "rows", "video")].mean(1)
    assert (c * c.shape[-1] > 10).sum(-1).tolist() == [0, 1]
    assert value_of(Locality(), call)["sink"] == pytest.approx([0, c[1, 30]], abs=1e-5)


@pytest.mark.parametrize("given", EVERY, ids=str)
def test_distances_equal_the_matrix(given):
    call, readout = one_call(grid=GRID, sharp=3.0, **given), Locality()
    metrics, p = readout.metrics(value_of(readout, call)), pairs(call)
    p = p / p.sum(-1, keepdims=True)
    seen, uniform = slow_distances(call, p), slow_distances(call, np.full_like(p, 1 / p.shape[-1]))
    for name, heads in seen.items():
        assert metrics[name] == pytest.approx(heads, abs=2e-5), name
    for name in ("frame_distance", "spatial_distance"):
        assert metrics[f"{name}_normalised"] == pytest.approx(seen[name] / uniform[name], abs=2e-5)
    assert list(metrics) == list(readout.definitions)


def slow_distances(call, p):
    """Sums over all pairs of video tokens, p [H, V, V] with rows that sum to one."""
    gaps = np.array([[np.abs(np.subtract(here, there)) for there in places(call)] for here in places(call)])
    df, dy, dx = np.moveaxis(gaps, -1, 0)

    def mean(values):
        return (p * values).sum(-1).mean(1)

    def radius(d):
        within = np.stack([mean(d <= r) for r in range(d.max() + 1)], 1)
        return [next(r for r, mass in enumerate(head) if mass >= 0.9) for head in within]

    return {
        "frame_distance": mean(df),
        "vertical_distance": mean(dy),
        "horizontal_distance": mean(dx),
        "spatial_distance": mean(dy + dx),
        "frame_spread": np.sqrt(mean(df**2) - mean(df) ** 2),
        "spatial_rms": np.sqrt(mean(dy**2 + dx**2)),
        "frame_radius": radius(df),
        "vertical_radius": radius(dy),
        "horizontal_radius": radius(dx),
    }


def test_uniform_attention_is_its_own_baseline():
    readout = Locality()
    metrics = readout.metrics(value_of(readout, one_call(grid=Grid(10, 2, 3), sharp=0.0)))
    for band in BANDS:
        assert metrics[f"{band}_mass"] == pytest.approx(metrics[f"{band}_uniform"], abs=1e-6)
    assert metrics["frame_distance_normalised"] == pytest.approx([1, 1], abs=1e-5)
    assert metrics["spatial_distance_normalised"] == pytest.approx([1, 1], abs=1e-5)
    assert metrics["frame_distance"] == pytest.approx([3.3, 3.3], abs=1e-5)
    assert metrics["frame_radius"].tolist() == [7, 7]


def test_a_radius_that_holds_exactly_90_percent_is_enough():
    """0.9 in float32 is less than 0.9."""
    readout = Locality()
    value = value_of(readout, one_call(grid=Grid(2, 3, 4)))
    value["frame"] = np.float32([[[0.9, 0.1], [0.1, 0.9]], [[0.8, 0.2], [0.1, 0.9]]])
    assert readout.metrics(value)["frame_radius"].tolist() == [0, 1]


def test_a_picture_has_no_distance_in_time():
    readout = Locality()
    metrics = readout.metrics(value_of(readout, one_call(grid=Grid(1, 3, 5))))
    assert np.isnan(metrics["frame_distance_normalised"]).all()
    for name in ("frame_distance", "frame_spread", "temporal_mass", "temporal_uniform", "frame_radius"):
        assert (metrics[name] == 0).all()


def class_call(dtype=torch.float32):
    """Heads that look at their own frame, at their own position, at the text, and anywhere, by directions of their own:
    12 + 5 + 1 of 32 channels are one-hot places."""
    call = one_call(dtype, grid=Grid(5, 3, 4), heads=4, dim=32, sharp=0.3)
    q, k = call.q.clone(), call.k.clone()
    rows = where(call, "rows", "video")
    for i, (f, y, x) in zip(rows, places(call), strict=True):
        q[0, 0, i, f] = k[0, 0, i, f] = 7.0
        q[0, 1, i, 5 + 4 * y + x] = k[0, 1, i, 5 + 4 * y + x] = 7.0
    q[0, 2, rows, 31], k[0, 2, where(call, "columns", "text"), 31] = 7.0, 7.0
    call.rebind(q=q, k=k)
    return call


def test_classes_of_heads_follow_from_the_metrics():
    call, readout, recovery = class_call(), Locality(radius=0), Recovery(radius=0)
    m = readout.metrics(value_of(readout, call))
    uniform = float(m["spatial_uniform"][0]), float(m["temporal_uniform"][0])
    kinds = measure.head_class(m["spatial_mass"], m["temporal_mass"], m["text_mass"], m["sink_mass"], uniform)
    assert kinds.tolist() == ["spatial", "temporal", "text", "global"]
    errors = recovery.metrics(value_of(recovery, call))
    assert errors["recovery_margin"][0] > 3
    assert errors["recovery_margin"][1] < -3
    assert errors["spatial_error"][0] < 0.05
    assert errors["temporal_error"][1] < 0.05
    assert min(errors["spatial_error"][3], errors["temporal_error"][3]) > 0.1
    assert set(errors) == set(recovery.definitions)


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("given", EVERY, ids=str)
@pytest.mark.parametrize(("rows", "radius"), [(4, 1), (99, 0)])
def test_recovery_equals_the_matrix(dtype, given, rows, radius):
    call = one_call(dtype, grid=GRID, **given)
    readout = Recovery(rows=rows, radius=radius, seed=5)
    value, p = value_of(readout, call), matrix(call)
    v = call.v[0].double().numpy()[:, : p.shape[-1]]
    columns, video = where(call, "columns", "video"), where(call, "rows", "video")
    drawn = [video.index(i) for i in sample.video_rows(call.entry(0).rows, rows, 5).ravel()]
    assert len(drawn) == 3 * min(rows, 12)
    for n, spatial in enumerate((True, False)):
        mask = np.ones((len(video), p.shape[-1]), bool)
        for i, here in enumerate(places(call)):
            for j, there in zip(columns, places(call), strict=True):
                near = max(abs(here[1] - there[1]), abs(here[2] - there[2])) <= radius
                mask[i, j] = here[0] == there[0] if spatial else near
        kept = p[:, video] * mask
        out, sparse = p[:, video] @ v, kept / kept.sum(-1, keepdims=True) @ v
        error = ((out - sparse)[:, drawn] ** 2).sum((1, 2)) / (out[:, drawn] ** 2).sum((1, 2))
        assert np.abs(value[:, n] - error).max() < BOUND[dtype] * 5
        assert error.min() > 0.01
    metrics = readout.metrics(value)
    assert metrics["recovery_margin"] == pytest.approx(np.log(value[:, 1] / value[:, 0]), abs=1e-5)


def test_a_picture_is_recovered_by_its_own_frame():
    readout = Recovery(radius=0)
    metrics = readout.metrics(value_of(readout, one_call(grid=Grid(1, 3, 5))))
    assert (metrics["spatial_error"] < 1e-9).all()
    assert (metrics["recovery_margin"] > 10).all()


def test_predicted_cost_and_the_radius_are_told():
    layout = TokenLayout("text-video", 7, Grid(3, 2, 4))
    assert Locality(radius=0).cost(layout) == pytest.approx((24 / 31) ** 2 + 1 + 8 / 31 + 3 / 31)
    assert Recovery(rows=2).cost(layout) == pytest.approx(8 * 6 / 31)
    assert "+-3 in other frames" in Locality(radius=3).definitions["temporal_mass"]
    assert "+-3 in every frame" in Recovery(radius=3).definitions["temporal_error"]


def test_cross_attention_and_senseless_sizes_are_refused():
    for readout in (Locality(), Recovery()):
        with pytest.raises(probe.MmditError, match="must select attention of a kind it can read"):
            probe.Plan([readout], 2, 3, kinds=("cross",))
    with pytest.raises(probe.MmditError, match="The radius of a band must be 0 or more. Got -1"):
        Locality(radius=-1)
    with pytest.raises(probe.MmditError, match="Recovery must have radius >= 0 and rows >= 1. Got 0 and 0"):
        Recovery(radius=0, rows=0)
