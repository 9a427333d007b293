"""Nearest neighbours against a loop over all pairs, and the transfers they steer."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import control
import probe
from control import match
from control.address import Found
from control.bank import Bank
from control.match import Match, nearest
from control.source import Itself, Peer, Stored
from probe.errors import PlanError, UsageError
from probe.layout import Grid
from probe.region import frames, video
from probe.site import Branch, Where
from tests import tiny
from tests.control.whole import batch, double_call, served
from tests.toys import Case
from tests.toys.bench import Keep, bench_of

pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast")  # Mochi's own, on every CPU

HERE = Where(steps=0, layers=0, heads=0)
BOTH = [tiny.PROMPT, tiny.OTHER]


@pytest.fixture(scope="module")
def pipe():
    return tiny.pipeline()


def slow(a, b, among=None):
    """(index, cosine) of each vector [C] of a among those of b, in double precision."""
    found = []
    for vector in a.double():
        cosines = [float(vector @ other / (vector.norm() * other.norm())) for other in b.double()]
        some = [j for j in range(len(b)) if among is None or among[j]]
        best = max(some, key=lambda j: cosines[j])
        found.append((best, cosines[best]))
    return found


def vectors(tensor):
    """[n, H D] of a tensor [H, n, D]."""
    return torch.stack([tensor[:, i].flatten() for i in range(tensor.shape[1])])


@pytest.mark.parametrize("chunk", [2**26, 1])
@pytest.mark.parametrize("among", [None, [True, False, True] * 7])
def test_nearest_equals_a_loop(monkeypatch, chunk, among):
    monkeypatch.setattr(match, "_CHUNK_BYTES", chunk)
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(13, 6, generator=generator), 5 * torch.randn(21, 6, generator=generator)
    index, cosine = nearest(a, b, None if among is None else torch.tensor(among))
    expected = slow(a, b, among)
    assert index.tolist() == [j for j, _ in expected]
    assert cosine.tolist() == pytest.approx([c for _, c in expected], abs=1e-6)


@pytest.mark.parametrize("case", ["cogvideox", "mochi", "wan"])
def test_matched_transfers_equal_indexing(case):
    """v of the nearest by k, where the cosine is above the median one."""
    bench = bench_of(Case(case))
    pairs = pairs_of(bench)
    threshold = np.median([cosine for *_, found in pairs for _, cosine in found])
    edit = control.Transfer("v", 0, 1, mapping=Match(features="k", threshold=threshold), where=HERE)
    for (call, row), (source, other), found in pairs_of(bench, edit):
        inside, theirs = call.rows.video_slice, source.rows.video_slice
        expected = call.own["v"][row].clone()
        for i, (j, cosine) in enumerate(found):
            if cosine > threshold:
                expected[0, inside.start + i] = source.own["v"][other, 0, theirs.start + j]
        assert torch.equal(call.v[row], expected)
        assert not torch.equal(call.v[row], call.own["v"][row])


def pairs_of(bench, *edits):
    """Of each half at the first step: target and source (call, row), and the neighbours by k of head 0."""
    keep = Keep(Where(steps=0, layers=0, kinds={"joint", "self"}))
    bench.latents(*edits, keep, prompt=BOTH)
    at = {branch: (call, row) for call in keep.calls for row, branch in enumerate(call.branches)}
    for branch in (one for one in at if one.prompt == 1):
        both = at[branch], at[replace(branch, prompt=0)]
        a, b = (vectors(call.own["k"][row, :1, call.rows.video_slice]) for call, row in both)
        yield *both, slow(a, b)


def test_frames_take_outputs_of_their_nearest_in_a_keyframe(pipe):
    """TokenFlow: neighbours among the source's own frames move the target's own outputs."""
    keep = Keep()
    here = Match(Peer(0), "o", among=frames(0), of=Peer(0))
    edit = control.Transfer("o", Itself(), 1, mapping=here, rows=video() & ~frames(0), where=Where(steps=0, layers=0))
    tiny.latents(probe.trace(pipe, edit, keep), BOTH)
    call, at = keep.calls[0], tiny.TEXT
    for row, source in ((1, 0), (3, 2)):
        own, features = call.own["out"], vectors(call.own["out"][source, :, at:])
        expected, (index, _) = own[row].clone(), nearest(features, features[:16])
        expected[:, at + 16 :] = own[row, :, at + index[16:]]
        assert torch.equal(call.out[row], expected)
        assert not torch.equal(call.out[row], own[row])


class Some(Found):
    """Another area for each batch entry."""

    def __init__(self, *areas):
        self.areas = areas

    def __str__(self):
        return "some"

    def inside(self, call, entry, side):
        return torch.from_numpy(self.areas[entry].mask(getattr(call, side)))


@pytest.mark.parametrize("features", ["q", "k", "v"])
@pytest.mark.parametrize("source", [None, 0])
def test_candidates_are_of_the_source(features, source):
    """Its object lies in other frames than that of the target."""
    call = batch([Branch(0), Branch(1)], prompts=2)
    own, at = call.own[features].clone(), slice(15, 31)
    mapping = Match(source, features, among=Some(frames(1, 3), frames(0)))
    served(call, control.Transfer("v", 0, 1, mapping=mapping))
    found = slow(vectors(own[1, :, 7:]), vectors(own[0, :, at]))
    expected = call.own["v"][1].clone()
    expected[:, 7:] = call.own["v"][0][:, at][:, [j for j, _ in found]]
    assert torch.equal(call.v[1], expected)


@pytest.mark.parametrize("grid", [Grid(3, 2, 4), Grid(2, 3, 5)])
def test_candidates_of_a_bank_are_on_its_own_grid(grid):
    bank, first, call = Bank("kv"), double_call(seed=3, grid=grid), double_call()
    bank.begin((), 10, 1)
    bank.serve(first, (0,))
    k, v = (first.own[name][0, :, 7 : 7 + grid.patches] for name in "kv")
    found = slow(vectors(call.own["k"][0, :, 7:]), vectors(k))
    expected = call.own["v"][0].clone()
    expected[:, 7:] = v[:, [j for j, _ in found]]
    served(call, control.Transfer("v", Stored(bank), mapping=Match(among=frames(0))))
    assert torch.equal(call.v[0], expected)
    with pytest.raises(UsageError, match="source in another call must be a region. Got some"):
        served(double_call(), control.Transfer("v", Stored(bank), mapping=Match(among=Some(frames(0)))))


def test_the_nearest_to_a_token_is_itself(pipe):
    """So that a match with itself changes nothing; nor does a threshold above 1."""
    plain = tiny.latents(pipe, BOTH)
    assert torch.equal(tiny.latents(probe.trace(pipe, control.Transfer("kv", Itself(), mapping=Match())), BOTH), plain)
    high = control.Transfer("kv", 0, 1, mapping=Match(threshold=1.5))
    assert torch.equal(tiny.latents(probe.trace(pipe, high), BOTH), plain)
    low = control.Transfer("kv", 0, 1, mapping=Match(threshold=-1.5))
    assert not torch.equal(tiny.latents(probe.trace(pipe, low), BOTH), plain)


def test_a_match_refuses(pipe):
    with pytest.raises(UsageError, match="compare q, k, v or o. Got 'h'"):
        Match(features="h")
    for wrong, said in (
        (Match(features="o"), "once the attention ran"),
        (Match(lambda branch: None), "must have a source for each target"),
        (Match(among=video() & ~video()), "rows to choose from"),
    ):
        with pytest.raises(PlanError, match=said):
            tiny.latents(probe.trace(pipe, control.Transfer("v", 0, 1, mapping=wrong)), BOTH)
