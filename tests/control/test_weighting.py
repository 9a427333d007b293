"""All edits of the weights at once in whole pipelines, against an independent patch of their attention."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import probe
from control.bias import Bias
from control.extend import Extend
from control.reweight import Reweight
from control.source import Itself
from control.window import Window
from probe.region import box, video, words
from tests import tiny
from tests.toys import Case
from tests.toys.bench import bench_of
from tests.toys.stock import followed

pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast")  # Mochi's own, on every CPU

GRIDS = {"cogvideox": (3, 4, 4), "sd3": (1, 4, 6), "hunyuan": (3, 2, 3), "mochi": (3, 2, 3), "wan": (3, 4, 4)}
TEXT_FIRST = ("cogvideox",)
POOL = (1, 2, 2)


@pytest.fixture(scope="module", params=GRIDS)
def bench(request):
    return bench_of(Case(request.param))


def edits():
    """A word counts e as much, the video sees near places, a corner counts -0.5, and pooled keys join."""
    return [
        Bias(1.0, words("cat"), rows=video()),
        Window(radius=2),
        Reweight(box(0, 0, 1, 2), -0.5),
        Extend(Itself(), pool=POOL, rows=video()),
    ]


def places(grid):
    """(y, x) of each video token."""
    return torch.tensor([(y, x) for _ in range(grid[0]) for y in range(grid[1]) for x in range(grid[2])])


def attention(q, k, v, mask, grid, start, cat, conditional):
    """float64; `start` is where the video columns begin, None without, `cat` are the columns of the word."""
    size = math.prod(grid)
    q, k, v = (x.double() for x in (q, k, v))
    logits = q @ k.mT * q.shape[-1] ** -0.5
    if mask is not None:
        logits = logits.masked_fill(~mask, -math.inf)
    rows = slice(start or 0, (start or 0) + size)
    for entry in conditional:
        for column in cat:
            logits[entry, :, rows, column] += 1.0
    if start is None:
        return logits.softmax(-1) @ v
    yx = places(grid)
    far = (yx[:, None] - yx).square().sum(-1) >= 4
    logits[..., rows, rows] = logits[..., rows, rows].masked_fill(far, -math.inf)
    pooled = [F.avg_pool3d(x[..., rows, :].mT.flatten(0, 1).unflatten(-1, grid), POOL, ceil_mode=True) for x in (k, v)]
    extra_k, extra_v = (x.flatten(2).mT.unflatten(0, k.shape[:2]) for x in pooled)
    more = q @ extra_k.mT * q.shape[-1] ** -0.5
    outside = torch.ones(q.shape[-2], dtype=torch.bool)
    outside[rows] = False
    more[..., outside, :] = -math.inf
    p = torch.cat([logits, more], -1).softmax(-1)
    corner = torch.zeros(p.shape[-1], dtype=torch.bool)
    corner[rows] = (yx[:, 0] == 0) & (yx[:, 1] < 2)
    p[..., rows, :] = torch.where(corner, -0.5, 1.0) * p[..., rows, :]
    return p @ torch.cat([v, extra_v], -2)


def test_edits_of_weights_equal_an_independent_patch(bench):
    """In both halves of guidance; the word in the conditional one."""
    name, grid, size = bench.case.module, GRIDS[bench.case.module], math.prod(GRIDS[bench.case.module])
    cat = probe.trace(bench.pipe).tokenize([tiny.PROMPT])[0].tokens_of("cat")

    def patched(call, run, q, k, v):
        start = 0 if bench.kind_of(call) != "cross" else None
        text = 0 if start is None else size
        if name in TEXT_FIRST:
            start, text = q.shape[-2] - size, 0
        columns = [] if bench.kind_of(call) == "self" else [text + token for token in cat]
        mask = run.keywords.get("attn_mask")
        return attention(q, k, v, mask, grid, start, columns, call.conditional).to(q.dtype)

    with followed(bench.pipe, bench.turns, patched):
        expected = bench.latents()
    got = bench.latents(*edits())
    scale = (expected - bench.plain).abs().max()
    assert (got - expected).abs().max() < 1e-3 * scale
    for left_out in range(len(edits())):
        others = [edit for i, edit in enumerate(edits()) if i != left_out]
        assert (bench.latents(*others) - expected).abs().max() > 0.01 * scale


def test_edits_that_change_nothing_keep_every_bit(bench):
    nothing = [
        Bias(0.0, video()),
        Bias(1.0, words("cat"), strength=0.0),
        Window(radius=99),
        Reweight(video(), 1.0),
        Extend(Itself(), strength=0.0),
    ]
    assert torch.equal(bench.latents(*nothing), bench.plain)
