"""Kept mass and sparsity against the whole matrix in float64; the interval of sampled rows against many draws."""

import math

import numpy as np
import pytest
import torch
from scipy.special import stdtrit

import probe
from probe import region
from probe.layout import Grid, TokenLayout
from probe.readout import sample
from probe.readout.kept import Blocks, FrameWindow, KeptMass, Tube
from probe.readout.sparsity import DROPPED, QUANTITIES, WANTED, Sparsity
from tests.probe.readout import calls
from tests.probe.readout.calls import matrix, one_call, value_of, where

BOUND = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 2e-4, torch.float16: 2e-4}  # kept in float32
EXACT = (torch.float64, torch.float32)
WIDE = Grid(4, 2, 3)


def places(call):
    """(frame, row, column) of each video token, in order."""
    return list(np.ndindex(call.layout.grid.shape))


def slow_pattern(call, keeps, text):
    """bool [video rows, columns]: one pair of video tokens at a time; text columns are all kept or none."""
    mask = np.full((call.layout.grid.size, len(calls.tokens(call, "columns"))), text)
    columns = where(call, "columns", "video")
    for i, here in enumerate(places(call)):
        for j, there in zip(columns, places(call), strict=True):
            mask[i, j] = keeps(here, there)
    return mask


def near(here, there, radius):
    return max(abs(here[1] - there[1]), abs(here[2] - there[2])) <= radius


PATTERNS = [
    (FrameWindow(), lambda a, b: a[0] == b[0], False),
    (FrameWindow(0, text=True), lambda a, b: a[0] == b[0], True),
    (FrameWindow(1, text=True), lambda a, b: abs(a[0] - b[0]) <= 1, True),
    (FrameWindow(2), lambda a, b: abs(a[0] - b[0]) <= 2, False),
    (FrameWindow(9, text=True), lambda a, b: True, True),
    (Tube(), lambda a, b: near(a, b, 0), False),
    (Tube(1, text=True), lambda a, b: near(a, b, 1), True),
    (Tube(1, own=False), lambda a, b: near(a, b, 1) and a[0] != b[0], False),
    (Tube(7), lambda a, b: True, False),
    (region.frames(1, 3), lambda a, b: 1 <= b[0] < 3, False),
    (region.box(0, 1, 1, 3), lambda a, b: b[1] < 1 and 1 <= b[2] < 3, False),
]


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize(
    "given", [{}, {"order": "video-text"}, {"order": "video-text", "visible": 29}, *calls.SELF], ids=str
)
def test_kept_mass_equals_the_matrix(dtype, given):
    call = one_call(dtype, grid=WIDE, **given)
    p = matrix(call)[:, where(call, "rows", "video")]
    for pattern, keeps, text in PATTERNS:
        kept = (p * slow_pattern(call, keeps, text)).sum(-1)
        readout = KeptMass(pattern)
        value = value_of(readout, call)
        assert np.abs(value["mean"] - kept.mean(1)).max() < BOUND[dtype], str(readout)
        assert np.abs(value["low"] - np.percentile(kept, 10, axis=1)).max() < BOUND[dtype], str(readout)
        metrics = readout.metrics(value)
        assert list(metrics) == list(readout.definitions)
        assert np.array_equal(list(metrics.values()), [value["mean"], value["low"]])


@pytest.mark.parametrize("given", calls.JOINT + calls.CROSS, ids=str)
def test_kept_mass_of_words_equals_the_matrix(given):
    call = one_call(**given)
    columns = [where(call, "columns", "text")[i] for i in (1, 2)]
    kept = matrix(call)[:, where(call, "rows", "video")][..., columns].sum(-1)
    assert value_of(KeptMass(region.words("red cat")), call)["mean"] == pytest.approx(kept.mean(1), abs=1e-5)


def test_kept_mass_of_frames_is_read_from_the_parts_that_are_there():
    call = one_call(grid=WIDE)
    call.run_in_parts()
    kept = (matrix(call)[:, where(call, "rows", "video")] * slow_pattern(call, lambda a, b: a[0] == b[0], False)).sum(
        -1
    )
    assert value_of(KeptMass(FrameWindow()), call)["mean"] == pytest.approx(kept.mean(1), abs=1e-5)


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("given", calls.JOINT + calls.SELF + calls.CROSS, ids=str)
def test_kept_mass_of_blocks_equals_the_matrix(dtype, given):
    call = one_call(dtype, **given)
    p, size = matrix(call), 5
    shape = [math.ceil(n / size) for n in p.shape[1:]]
    keep = np.random.default_rng(0).random(shape) < 0.5
    keep[1] = False
    full = keep.repeat(size, 0).repeat(size, 1)[: p.shape[1], : p.shape[2]]
    kept = (p * full).sum(-1)[:, where(call, "rows", "video")]
    value = value_of(KeptMass(Blocks(keep, size)), call)
    assert np.abs(value["mean"] - kept.mean(1)).max() < BOUND[dtype]
    assert np.abs(value["low"] - np.percentile(kept, 10, axis=1)).max() < BOUND[dtype]


def test_metrics_of_kept_mass_are_named_after_the_pattern():
    keep = np.eye(4, dtype=bool)
    patterns = FrameWindow(1, text=True), Tube(2, own=False), region.words("red cat"), Blocks(keep, 8)
    assert [next(iter(KeptMass(pattern).definitions)) for pattern in patterns] == [
        "kept_mass_frames_within_1_and_text",
        "kept_mass_position_within_2_in_other_frames",
        "kept_mass_words_red_cat",
        "kept_mass_blocks_of_8_25_kept",
    ]
    readout = KeptMass(region.video(), name="all")
    assert list(readout.metrics(value_of(readout, one_call()))) == ["kept_mass_all", "kept_mass_all_low"]


def test_predicted_cost_counts_the_pairs_that_are_kept():
    layout = TokenLayout("text-video", 7, Grid(3, 2, 4))
    costs = {
        KeptMass(FrameWindow()): 8 / 31,
        KeptMass(FrameWindow(1, text=True)): 1.0,
        KeptMass(Tube(1)): 27 / 31,
        KeptMass(region.frames(1)): 8 / 31,
        KeptMass(region.words("cat")): 1.0,
        KeptMass(Blocks(np.eye(4, dtype=bool), 8)): 0.25,
        Sparsity(rows=4, text_rows=0): 7 * 12 / 31,
    }
    for readout, cost in costs.items():
        assert readout.cost(layout) == pytest.approx(cost)


def test_what_does_not_fit_is_refused():
    call = one_call()
    with pytest.raises(
        probe.MmditError, match="A block mask must be 7 x 7 for 31 rows and 31 keys in blocks of 5. Got 6 x 7"
    ):
        value_of(KeptMass(Blocks(np.ones((6, 7), bool), 5)), call)
    with pytest.raises(probe.MmditError, match="must lie in 0 to 2"):
        value_of(KeptMass(region.frames(3)), call)
    for wrong in (FrameWindow, Tube):
        with pytest.raises(probe.MmditError, match="must be 0 or more. Got -1"):
            wrong(-1)
    with pytest.raises(probe.MmditError, match="A block must hold 1 token or more. Got 0"):
        Blocks(np.ones((6, 7), bool), 0)
    for wrong in ({"rows": 1}, {"block": 0}, {"eps": 0.0}, {"text_rows": 1}):
        with pytest.raises(probe.MmditError, match="Sparsity must have rows >= 2"):
            Sparsity(**wrong)


def test_patterns_of_frames_are_not_for_cross_attention():
    assert KeptMass(FrameWindow()).kinds == {"joint", "double", "single", "self"}
    assert KeptMass(region.text()).kinds is None
    with pytest.raises(probe.MmditError, match=r"Got KeptMass\(frames within 0\), which reads"):
        probe.Plan([KeptMass(FrameWindow())], 2, 3, kinds=("cross",))


def slow_rows(call, block, eps):
    """QUANTITIES of every row, one row at a time, [H, N, 12]."""
    p = matrix(call)
    heads, rows, keys = p.shape
    choice = slow_choice(call, block)
    found = np.zeros((heads, rows, len(QUANTITIES)))
    for h in range(heads):
        for i in range(rows):
            ordered = sorted(p[h, i], reverse=True)
            mass = np.cumsum(ordered)
            numbers = [mass[math.ceil(keys * (100 - s) / 100) - 1] for s in DROPPED]
            numbers += [(np.flatnonzero(mass >= min(t / 100, mass[-1]))[0] + 1) / keys for t in WANTED]
            numbers.append(sum(one > eps / keys for one in p[h, i]) / keys)
            for s in DROPPED:
                inside = [j for j in range(keys) if j // block in choice[s][h][i // block]]
                numbers.append(p[h, i, inside].sum())
            found[h, i] = numbers
    return found


def slow_choice(call, block):
    """dropped -> head -> block of rows -> the blocks of keys it keeps."""
    rows, keys = matrix(call).shape[1:]
    q, k = (x[0].double().numpy()[:, :n] for x, n in ((call.q, rows), (call.k, keys)))
    pool = [np.stack([x[:, i : i + block].mean(1) for i in range(0, x.shape[1], block)], 1) for x in (q, k)]
    logits = pool[0] @ pool[1].swapaxes(1, 2)
    count = logits.shape[-1]
    return {
        s: [[set(np.argsort(-row)[: math.ceil(count * (100 - s) / 100)]) for row in head] for head in logits]
        for s in DROPPED
    }


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("given", calls.JOINT + calls.SELF + calls.CROSS, ids=str)
def test_sparsity_of_all_rows_equals_the_matrix_and_has_no_error(dtype, given):
    call, readout = one_call(dtype, heads=3, **given), Sparsity(block=4, eps=1.5)
    value, expected = value_of(readout, call), slow_rows(call, 4, 1.5)
    counts = [name.startswith("needed") or name == "above_threshold" for name in QUANTITIES]
    slack = np.where(counts, 2e-3 if dtype not in EXACT else 0, 0)
    for group, name in enumerate(("video", "text")):
        rows = where(call, "rows", name)
        if rows:
            assert (np.abs(value["mean"][:, group] - expected[:, rows].mean(1)) < BOUND[dtype] + slack).all()
            assert (value["half_width"][:, group] == 0).all()
        else:
            assert np.isnan([value["mean"][:, group], value["half_width"][:, group]]).all()
    metrics = readout.metrics(value)
    assert list(metrics) == list(readout.definitions)
    assert np.array_equal(metrics["needed_keys_95"], value["mean"][:, 0, 5])
    assert np.array_equal(metrics["above_threshold_half_width"], value["half_width"][:, 0, 7])


def test_uniform_attention_is_not_sparse():
    """20 keys in 10 blocks: 18 of them hold 90 %; a key more or less for rounding."""
    call = one_call(text=4, pads=0, grid=Grid(2, 2, 4), sharp=0.0)
    (kept, needed, above, recall) = np.split(value_of(Sparsity(block=2), call)["mean"], (4, 7, 8), axis=-1)
    assert np.allclose(kept, [0.5, 0.2, 0.1, 0.05])
    assert np.allclose(needed, [0.9, 0.95, 1.0], atol=0.051)
    assert not above.any()
    assert np.allclose(recall, [0.5, 0.2, 0.1, 0.1])


def test_the_sampled_rows_are_the_rows_that_are_measured():
    call = one_call(text=16, grid=Grid(3, 4, 4))
    value = value_of(Sparsity(rows=9, text_rows=10, block=4, seed=7), call)
    every = slow_rows(call, 4, 1.0)
    video = sample.video_rows(call.layout, 9, 7)
    text = np.array(where(call, "rows", "text"))[sample.draw(1, 14, 10, 7)]
    for group, (rows, population) in enumerate(((video, 16), (text, 14))):
        mean, half = slow_interval(every[:, rows], population)
        assert value["mean"][:, group] == pytest.approx(mean, abs=1e-5)
        assert value["half_width"][:, group] == pytest.approx(half, rel=1e-3, abs=1e-6)
        assert (half > 0).any()


def slow_interval(values, population):
    """Mean and half-width [H, Q] of values [H, strata, m, Q], by the textbook, with scipy's Student's t."""
    _, strata, m, _ = values.shape
    parts = values.var(2, ddof=1) / m * (1 - m / population)
    total = parts.sum(1)
    with np.errstate(invalid="ignore"):
        freedom = (m - 1) * total**2 / (parts**2).sum(1)
    half = stdtrit(np.nan_to_num(freedom, nan=1), 0.975) * np.sqrt(total) / strata
    return values.mean((1, 2)), half


def test_rows_are_drawn_without_torch_and_without_replacement():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    drawn = sample.draw(4, 20, 8, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert drawn.shape == (4, 8)
    assert all(len(set(one)) == 8 and list(one) == sorted(one) for one in drawn.tolist())
    assert set(drawn.ravel().tolist()) <= set(range(20))
    assert len({tuple(one) for one in drawn.tolist()}) == 4
    assert np.array_equal(drawn, sample.draw(4, 20, 8, seed=3))
    assert not np.array_equal(drawn, sample.draw(4, 20, 8, seed=4))
    assert sample.draw(2, 3, 8, seed=0).tolist() == [[0, 1, 2]] * 2
    layout = one_call(order="text-video", grid=Grid(3, 2, 4)).layout
    rows = sample.video_rows(layout, 3, 0)
    assert all(layout.frame_slice(f).start <= i < layout.frame_slice(f).stop for f in range(3) for i in rows[f])


def test_chunks_change_nothing(monkeypatch):
    call = one_call(grid=Grid(3, 4, 4))
    whole = value_of(Sparsity(), call)
    sizes = []
    real = sample.attend.probabilities
    monkeypatch.setattr(sample, "CHUNK", 4 * call.layout.total)
    monkeypatch.setattr(sample.attend, "probabilities", lambda q, *a: sizes.append(len(q)) or real(q, *a))
    parts = value_of(Sparsity(), call)
    assert max(sizes) == 4
    assert len(sizes) == 2 * math.ceil((48 + 5) / 4)
    assert np.allclose(parts["mean"], whole["mean"], atol=1e-6)


def test_the_interval_holds_the_true_value_in_most_draws():
    """Half of the rows of each frame of a flat, a mixed and a peaked head, 50 draws; it says 95 % of them."""
    call = one_call(heads=3, grid=Grid(3, 6, 10), sharp=1.0)
    call.rebind(q=call.q * torch.tensor([0.5, 2.0, 6.0])[:, None, None])
    true = value_of(Sparsity(rows=60, text_rows=0, block=8), call)["mean"][:, 0]
    inside = []
    for seed in range(50):
        value = value_of(Sparsity(rows=30, text_rows=0, block=8, seed=seed), call)
        inside.append(np.abs(value["mean"][:, 0] - true) <= value["half_width"][:, 0])
    assert (np.mean(inside, (0, 2)) > 0.9).all()
    assert np.mean(inside) < 0.99


def test_the_text_needs_no_prompt_when_it_is_left_out():
    call = one_call()
    call.prompts = ()
    assert np.isnan(value_of(Sparsity(text_rows=0), call)["mean"][:, 1]).all()
    with pytest.raises(probe.MmditError, match="must know the prompt"):
        value_of(Sparsity(), call)
