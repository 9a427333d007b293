"""Shifts equal rows moved by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import probe
from control.shift import Shift, Steering
from probe.errors import UsageError
from probe.layout import TokenLayout
from probe.region import box, text, video, words
from tests.control.hand import patched_block
from tests.toys import Case
from tests.toys.bench import Keep, bench_of
from tests.toys.stock import followed

pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast")

CASES = [*map(Case, ("cogvideox", "hunyuan", "mochi", "sd3", "flux", "wan"))]
AT = {"layers": 1, "branches": probe.Which(guided=True)}
FIRST_KIND = {
    "cogvideox": "joint",
    "hunyuan": "double",
    "mochi": "joint",
    "sd3": "joint",
    "flux": "double",
    "wan": "self",
}
UPPER, LEFT = box(0, 0, bottom=1), box(0, 0, right=1)
"""The first row and the first column of every frame."""


@pytest.fixture(scope="module", params=CASES, ids=str)
def bench(request):
    return bench_of(request.param)


def rows_of(bench) -> TokenLayout:
    """The rows of an attention call in layer 1."""
    keep = Keep(probe.Where(layers=1, steps=0, branches=AT["branches"]))
    bench.latents(keep)
    return keep.calls[0].rows


def in_frames(rows: TokenLayout) -> tuple[Tensor, Tensor]:
    """The tokens of UPPER and LEFT among the video."""
    place = torch.arange(rows.grid.size) % rows.grid.patches
    return place < rows.grid.width, place % rows.grid.width == 0


def moved(x: Tensor, rows: Tensor, way: Tensor, keep_norm: bool) -> Tensor:
    """x [..., N, C] with some rows shifted, in float64."""
    new = x.double() + way.double()
    if keep_norm:
        new *= x.double().norm(dim=-1, keepdim=True) / new.norm(dim=-1, keepdim=True)
    return torch.where(rows.unsqueeze(-1), new.to(x.dtype), x)


def same_run(got: Tensor, expected: Tensor, plain: Tensor) -> bool:
    """Equal up to a thousandth of what the edit does."""
    effect = (expected - plain).abs().max()
    assert effect > 1e-3
    return bool((got - expected).abs().max() < 1e-3 * effect + 1e-5)


@pytest.mark.parametrize("keep_norm", [False, True])
def test_outputs_move_along_a_direction(bench, keep_norm):
    """One head of the conditional entries, in the video alone, half of the way."""
    way = torch.randn(bench.pipe.transformer.config.attention_head_dim, generator=torch.Generator().manual_seed(5))
    rows = rows_of(bench)
    inside = torch.zeros(rows.total, dtype=torch.bool)
    inside[rows.video_slice] = True

    def patched(at, run, q, k, v):
        out = run(q, k, v).clone()
        for row in at.conditional if at.layer == 1 and q.shape == k.shape else ():
            out[row, 1] = moved(out[row, 1], inside, 0.5 * way, keep_norm)
        return out

    with followed(bench.pipe, bench.turns, patched):
        expected = bench.latents()
    where = probe.Where(**AT, heads=1, kinds={FIRST_KIND[bench.case.module]})
    got = bench.latents(Shift("o", way, keep_norm, strength=0.5, where=where))
    assert same_run(got, expected, bench.plain)


def test_outputs_move_from_one_area_to_another(bench):
    """All heads, each along its own way; far, as toys attend almost evenly."""
    rows = rows_of(bench)
    upper, left = in_frames(rows)

    def patched(at, run, q, k, v):
        out = run(q, k, v).clone()
        for row in at.conditional if at.layer == 1 and q.shape == k.shape else ():
            there = out[row, :, rows.video_slice]
            way = there[:, upper].mean(1, keepdim=True) - there[:, left].mean(1, keepdim=True)
            out[row, :, rows.video_slice] = moved(there, left, 100 * way, keep_norm=False)
        return out

    with followed(bench.pipe, bench.turns, patched):
        expected = bench.latents()
    where = probe.Where(**AT, kinds={FIRST_KIND[bench.case.module]})
    edit = Shift("o", Steering(UPPER, LEFT), rows=LEFT, strength=100, where=where)
    assert same_run(bench.latents(edit), expected, bench.plain)


@pytest.mark.parametrize("keep_norm", [False, True])
def test_hidden_states_move_from_one_area_to_another(bench, keep_norm):
    """Once, where a layer attends twice; the text goes on as it was."""
    upper, left = in_frames(rows_of(bench))

    def patched(_, out, entries):
        new = out.clone()
        for entry in entries:
            way = out[entry, upper].double().mean(0) - out[entry, left].double().mean(0)
            new[entry] = moved(out[entry], left, way, keep_norm)
        return new

    with patched_block(bench, 1, patched, streams=("video",)):
        expected = bench.latents()
    edit = Shift("h", Steering(UPPER, LEFT), keep_norm, rows=LEFT, where=probe.Where(**AT))
    assert same_run(bench.latents(edit), expected, bench.plain)


def test_two_shifts_add_up(bench):
    width = bench.pipe.transformer.config.attention_head_dim
    one, other = torch.linspace(0, 1, width), torch.linspace(1, -1, width)
    both = bench.latents(Shift("o", one, where=probe.Where(**AT)), Shift("o", other, where=probe.Where(**AT)))
    whole = bench.latents(Shift("o", one + other, where=probe.Where(**AT)))
    assert same_run(both, whole, bench.plain)


def test_strength_zero_leaves_every_bit(bench):
    way = torch.ones(1)
    assert torch.equal(bench.latents(Shift("o", way, strength=0), Shift("h", way, strength=0)), bench.plain)


def test_a_steering_from_nowhere_stays(bench):
    """The unconditional half shows no words."""
    lost = Steering(words("red"), video())
    edit = Shift("o", lost, where=probe.Where(layers=1, branches=probe.Which(guided=False)))
    assert torch.equal(bench.latents(edit), bench.plain)


def test_what_cannot_be_shifted_is_refused():
    bench, way = bench_of(Case("cogvideox")), torch.ones(3)
    with pytest.raises(UsageError, match="A Shift must name o or h. Got 'q'"):
        Shift("q", way)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="leave heads out"):
        Shift("h", way, where=probe.Where(heads=0))
    with pytest.raises(UsageError, match=r"broadcast to \(2, 60, 16\). Got \(3,\)"):
        bench.latents(Shift("o", way))
    with pytest.raises(UsageError, match=r"broadcast to \(48, 32\). Got \(3,\)"):
        bench.latents(Shift("h", way))
    with pytest.raises(UsageError, match="must be of the video. Got text"):
        bench.latents(Shift("h", torch.ones(32), rows=text(), where=probe.Where(branches=probe.Which(guided=True))))
