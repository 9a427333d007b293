"""Rotations equal queries and keys turned by hand, and obey the laws of relative positions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import probe
from control.rotate import Rotate
from probe.errors import PlanError, UsageError
from probe.region import frames, video
from tests.toys import Case
from tests.toys.bench import Keep, bench_of
from tests.toys.stock import followed

pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast")

CASES = [Case("cogvideox", "rotary"), *map(Case, ("hunyuan", "mochi", "flux", "wan"))]
FIRST = probe.Where(layers=0, steps=0)


@pytest.fixture(scope="module", params=CASES, ids=str)
def bench(request):
    return bench_of(request.param)


def first_call(bench, *edits):
    """The first call with rotation of a traced run, as it is attended."""
    keep = Keep(FIRST)
    bench.latents(keep, *edits)
    return keep.calls[0]


def turned(x: Tensor, angles: Tensor) -> Tensor:
    """[H, n, D] by complex numbers in float64; angles [H or 1, n or 1, D / 2]."""
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles).double(), angles.double())).flatten(-2)


def logits(call, entry=0):
    video_slice = call.rows.video_slice
    both = call.q[entry].double() @ call.k[entry].double().mT
    return both, both[:, video_slice, video_slice]


def test_a_shift_equals_keys_turned_by_hand(bench):
    """In whole runs: conditional entries alone, rows of the first frame."""
    edit = Rotate("k", shift=(1, 2, -3), rows=frames(0), where=probe.Where(branches=probe.Which(guided=True)))
    call = first_call(bench)
    angles = call.rope.angles(torch.tensor([[1.0, 2.0, -3.0]]))
    frame = call.rows.frame_slice(0)

    def patched(at, run, q, k, v):
        k = k.clone()
        for row in at.conditional if q.shape == k.shape else ():  # not in Wan's cross attention
            k[row, :, frame] = turned(k[row, :, frame], angles).to(k.dtype)
        return run(q, k, v)

    with followed(bench.pipe, bench.turns, patched):
        expected = bench.latents()
    effect = (expected - bench.plain).abs().max()
    assert effect > 1e-4
    assert (bench.latents(edit) - expected).abs().max() < 0.03 * effect


def test_nothing_moved_is_nothing_changed(bench):
    stays = Rotate("qk", remap=lambda stand: stand.clone())
    for edit in (Rotate("qk", shift=(0, 0, 0)), stays, Rotate("k", shift=(1, 1, 1), strength=0)):
        assert torch.equal(bench.latents(edit), bench.plain)


def test_a_common_shift_leaves_the_logits_among_video_tokens(bench):
    plain, moved = first_call(bench), first_call(bench, Rotate("qk", shift=(1, 2, 3), where=FIRST))
    assert torch.allclose(logits(moved)[1], logits(plain)[1], atol=1e-4)
    if bench.family.kinds & {"joint", "double"}:
        assert (logits(moved)[0] - logits(plain)[0]).abs().max() > 1e-2


def test_keys_shifted_on_are_queries_shifted_back(bench):
    keys = first_call(bench, Rotate("k", shift=(1, 2, 3), where=FIRST))
    queries = first_call(bench, Rotate("q", shift=(-1, -2, -3), where=FIRST))
    assert torch.allclose(logits(keys)[1], logits(queries)[1], atol=1e-4)
    assert not torch.equal(keys.k, queries.k)


def test_dropped_is_remapped_to_the_origin(bench):
    dropped = first_call(bench, Rotate("qk", drop=True, where=FIRST))
    origin = first_call(bench, Rotate("qk", remap=torch.zeros_like, where=FIRST))
    assert torch.equal(dropped.k, origin.k)
    rope, video_slice = dropped.rope, dropped.rows.video_slice
    back = rope.turn(dropped.k[0][:, video_slice], rope.positions(dropped.rows))
    assert torch.allclose(back, dropped.own["k"][0][:, video_slice], atol=1e-5)


def test_axes_and_bands_add_up_to_the_whole(bench):
    """One after the other, in any order."""
    whole = first_call(bench, Rotate("k", shift=(1, 2, 3), where=FIRST)).k
    axes = [Rotate("k", shift=(1, 2, 3), axes=(axis,), where=FIRST) for axis in (2, 0, 1)]
    bands = [Rotate("k", shift=(1, 2, 3), band=(side, 0.5), where=FIRST) for side in ("high", "low")]
    assert torch.allclose(first_call(bench, *axes).k, whole, atol=1e-5)
    if bench.case.module == "mochi":  # each pair turns along all axes: 8 frequencies, halves of 4
        assert torch.allclose(first_call(bench, *bands).k, whole, atol=1e-5)
    one = first_call(bench, axes[0]).k
    assert not torch.allclose(one, whole, atol=1e-3)


def test_half_the_strength_is_half_the_way(bench):
    half = first_call(bench, Rotate("q", shift=(2, 4, -2), strength=0.5, where=FIRST))
    whole = first_call(bench, Rotate("q", shift=(1, 2, -1), where=FIRST))
    assert torch.equal(half.q, whole.q)


def test_one_head_turns_alone(bench):
    call = first_call(bench, Rotate("k", shift=(1, 1, 1), where=probe.Where(layers=0, steps=0, heads=1)))
    own = call.own["k"]
    assert torch.equal(call.k[:, 0], own[:, 0])
    video_slice = call.rows.video_slice
    for entry in range(len(own)):
        wanted = call.rope.turn(own[entry][:, video_slice], (1, 1, 1))[1]
        assert torch.equal(call.k[entry, 1, video_slice], wanted)


@pytest.mark.parametrize("case", [Case("cogvideox"), Case("sd3"), Case("sd3", "3.5")], ids=str)
def test_a_model_that_does_not_rotate_is_refused(case):
    with pytest.raises(PlanError, match=r"Rotate\(k drop\) must be used on a model that rotates"):
        case.toy.latents(probe.trace(case.pipeline(), Rotate("k", drop=True)), steps=2)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"tensors": "v", "drop": True}, "among q, k"),
        ({}, "one of shift, remap and drop. Got none"),
        ({"shift": (0, 1, 1), "drop": True}, r"Got shift \(0, 1, 1\), drop"),
        ({"drop": True, "axes": (3,)}, "among 0"),
        ({"drop": True, "band": ("middle", 0.5)}, "'low' or 'high'"),
    ],
)
def test_what_cannot_be_rotated_is_refused(arguments, said):
    with pytest.raises(UsageError, match=said):
        Rotate(**arguments)


def test_a_remap_of_another_size_is_refused():
    bench = bench_of(Case("flux"))
    with pytest.raises(UsageError, match=r"positions \(24, 3\). Got \(5, 3\)"):
        bench.latents(Rotate("k", remap=torch.zeros(5, 3), rows=video()))
