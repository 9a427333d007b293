"""Filters equal an explicit sum of waves, and single waves pass by the gain of their frequency."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import probe
from control.filter import Filter, blend_frequencies, low_pass
from probe.errors import UsageError
from probe.region import box, text
from tests.control.hand import patched_block
from tests.toys import Case
from tests.toys.bench import Keep, bench_of
from tests.toys.stock import followed

pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast")

GRID = (6, 5, 8)
GUIDED = probe.Which(guided=True)


def wave(axis: int, turns: int, phase: float = 0.3) -> Tensor:
    """A cosine with so many full turns along one axis of the grid, float64 [6, 5, 8, 1]."""
    line = torch.cos(2 * math.pi * turns * torch.arange(GRID[axis], dtype=torch.float64) / GRID[axis] + phase)
    return line.view([-1 if at == axis else 1 for at in range(4)]).expand(*GRID, 1)


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def slow(x: Tensor, cutoffs: dict[int, float]) -> Tensor:
    """The low pass of x [t, y, x, C] by matrices of waves, frequency by frequency."""
    y = x.numpy().astype(complex)
    for axis, cutoff in cutoffs.items():
        n = x.shape[axis]
        waves = np.exp(2j * np.pi * np.outer(np.arange(n), np.arange(n)) / n)
        gains = [math.exp(-0.5 * (2 * min(k, n - k) / n / cutoff) ** 2) for k in range(n)]
        y = np.moveaxis(np.tensordot(waves @ np.diag(gains) @ waves.conj() / n, y, (1, axis)), 0, axis)
    return torch.from_numpy(y.real)


@pytest.mark.parametrize(("axes", "cutoff"), [("tyx", 0.25), ("t", 0.5), ("yx", (0.3, 0.6)), ("xt", (0.2, 0.9))])
def test_the_low_pass_equals_a_sum_of_waves(axes, cutoff):
    each = cutoff if isinstance(cutoff, tuple) else (cutoff,) * len(axes)
    x = noise(*GRID, 3)
    expected = slow(x, {"tyx".index(axis): end for axis, end in zip(axes, each, strict=True)})
    assert torch.allclose(low_pass(x, cutoff, axes), expected, atol=1e-12)


@pytest.mark.parametrize(("axis", "turns"), [(0, 1), (0, 3), (1, 2), (2, 1), (2, 4), (2, 7)])
def test_a_wave_passes_by_the_gain_of_its_frequency(axis, turns):
    """7 turns of 8 are 1 turn backwards; at the cutoff the gain is exp(-1/2)."""
    n = GRID[axis]
    frequency = 2 * min(turns, n - turns) / n
    x = wave(axis, turns)
    assert torch.allclose(low_pass(x, frequency), math.exp(-0.5) * x, atol=1e-12)
    assert torch.allclose(low_pass(x, 2 * frequency), math.exp(-0.125) * x, atol=1e-12)
    others = "tyx".replace("tyx"[axis], "")
    assert torch.allclose(low_pass(x, 0.1, others), x, atol=1e-12)


def test_the_mean_passes_the_low_and_never_the_high():
    x = noise(*GRID, 3)
    low, high = (Filter("o", cutoff=1e-3, keep=keep).filtered(x) for keep in ("low", "high"))
    mean = x.mean((0, 1, 2), keepdim=True)
    assert torch.allclose(low, mean.expand_as(x), atol=1e-12)
    assert torch.allclose(high, x - mean, atol=1e-12)


def test_low_and_high_are_the_whole():
    x = noise(2, *GRID, 3)
    low, high, louder = (Filter("h", **kept).filtered(x) for kept in ({}, {"keep": "high"}, {"gain": 3.0}))
    assert torch.allclose(low + high, x, atol=1e-12)
    assert torch.allclose(louder, low + 3 * high, atol=1e-12)


def test_a_blend_takes_low_from_one_and_high_from_the_other():
    whole, local = noise(*GRID, 3), noise(*GRID, 3).flip(0)
    expected = slow(whole, dict.fromkeys(range(3), 0.25)) + local - slow(local, dict.fromkeys(range(3), 0.25))
    assert torch.allclose(blend_frequencies(whole, local), expected, atol=1e-12)
    assert torch.allclose(blend_frequencies(local, local), local, atol=1e-12)


def test_half_precision_is_filtered_in_single():
    x = noise(*GRID, 3).bfloat16()
    assert torch.equal(low_pass(x), low_pass(x.float()).bfloat16())


# --- in a run ---


@pytest.fixture(scope="module", params=[*map(Case, ("cogvideox", "mochi", "flux", "wan"))], ids=str)
def bench(request):
    return bench_of(request.param)


def grid_of(bench):
    keep = Keep(probe.Where(layers=0, steps=0))
    bench.latents(keep)
    return keep.calls[0].rows


def same_run(got: Tensor, expected: Tensor, plain: Tensor) -> bool:
    effect = (expected - plain).abs().max()
    assert effect > 1e-3
    return bool((got - expected).abs().max() < 1e-3 * effect + 1e-5)


def test_outputs_are_filtered_in_the_video_alone(bench):
    """High frequencies grow, as toys attend almost evenly."""
    rows = grid_of(bench)

    def patched(at, run, q, k, v):
        out = run(q, k, v).clone()
        for row in at.conditional if q.shape == k.shape else ():
            for head in range(out.shape[1]):
                there = out[row, head, rows.video_slice].view(*rows.grid.shape, -1)
                low = slow(there, {0: 0.25, 1: 0.25, 2: 0.25}).float()
                out[row, head, rows.video_slice] = (low + 100 * (there - low)).flatten(0, 2)
        return out

    with followed(bench.pipe, bench.turns, patched):
        expected = bench.latents()
    kinds = bench.family.kinds - {"cross"}
    got = bench.latents(Filter("o", gain=100, where=probe.Where(branches=GUIDED, kinds=kinds)))
    assert same_run(got, expected, bench.plain)


def test_hidden_states_are_filtered_once_and_in_some_rows(bench):
    rows = grid_of(bench)
    upper = torch.arange(rows.grid.size) % rows.grid.patches < rows.grid.width

    def patched(_, out, entries):
        new = out.clone()
        for entry in entries:
            there = out[entry].view(*rows.grid.shape, -1)
            high = (there - slow(there, {1: 0.5, 2: 0.5}).float()).flatten(0, 2)
            new[entry, upper] = high[upper]
        return new

    with patched_block(bench, 1, patched, streams=("video",)):
        expected = bench.latents()
    where = probe.Where(layers=1, branches=GUIDED)
    edit = Filter("h", "yx", 0.5, "high", rows=box(0, 0, bottom=1), where=where)
    assert same_run(bench.latents(edit), expected, bench.plain)


def test_no_strength_and_no_gain_leave_every_bit(bench):
    for edits in ((Filter("o", strength=0), Filter("h", strength=0)), (Filter("o", gain=1), Filter("h", gain=1))):
        assert torch.equal(bench.latents(*edits), bench.plain)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"tensor": "v"}, "A Filter must name o or h"),
        ({"axes": "xz"}, "some of t, y and x. Got 'xz'"),
        ({"axes": "tt"}, "some of t, y and x"),
        ({"cutoff": 0.0}, "cutoff above 0"),
        ({"axes": "yx", "cutoff": (0.1, 0.2, 0.3)}, "one for each of its axes"),
        ({"keep": "middle"}, "'low' or 'high'"),
        ({"tensor": "h", "where": probe.Where(heads=1)}, "leave heads out"),
    ],
)
def test_what_cannot_be_filtered_is_refused(arguments, said):
    with pytest.raises(UsageError, match=said):
        Filter(**{"tensor": "o", **arguments})


def test_text_is_not_filtered():
    bench = bench_of(Case("sd3"))
    with pytest.raises(UsageError, match="must be of the video. Got text"):
        bench.latents(Filter("o", rows=text(), where=probe.Where(branches=GUIDED)))
