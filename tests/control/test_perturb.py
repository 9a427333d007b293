"""Perturbed attention against the whole matrix in float64, and through pipelines of several families."""

import math

import pytest
import torch

from control.constant import Constant
from control.path import PathToIdentity
from control.perturb import (
    BlurQuery,
    MaskRegion,
    identity_attention,
    sharpest_attention,
    uniform_attention,
    video_mass_to_self,
)
from control.transfer import Transfer
from probe.errors import PlanError, UsageError
from probe.models.rope import Rope, by_axis
from probe.region import frames, video
from probe.site import Where, Which
from tests.control.drawn import GRID, TEXT, apart, drawn, hidden, served, whole
from tests.toys import Case
from tests.toys.bench import bench_of
from tests.toys.stock import arguments_of, followed

FIRST = Where(branches=Which(prompt=0))
VIDEO = torch.arange(TEXT + GRID.size) >= TEXT
AREAS = {"t": ~VIDEO, "v": VIDEO}
EYE = torch.eye(TEXT + GRID.size, dtype=torch.float64)

EDITS = {
    "identity of video": lambda **at: identity_attention("video", **at),
    "identity of all": lambda **at: identity_attention("all", **at),
    "mass to self": video_mass_to_self,
    "uniform": uniform_attention,
    "sharpest": sharpest_attention,
    "blur": lambda **at: BlurQuery(1.0, **at),
    "mask": lambda **at: MaskRegion("vv", **at),
    "path": lambda **at: PathToIdentity("slerp", **at),
}


@pytest.mark.parametrize("name", EDITS)
def test_strength_zero_keeps_every_bit_and_other_heads_and_entries_theirs(name):
    plain = served(drawn(dtype=torch.bfloat16))
    assert torch.equal(served(drawn(dtype=torch.bfloat16), EDITS[name](strength=0.0)), plain)
    where = Where(heads=(0, 2), branches=Which(prompt=1))
    out = served(drawn(dtype=torch.bfloat16), EDITS[name](where=where))
    assert torch.equal(out[0], plain[0])
    assert torch.equal(out[1, 1], plain[1, 1])
    assert not torch.equal(out[1, 0], plain[1, 0])


def test_the_two_identities_are_what_they_say_and_differ():
    logits, p, v = whole(drawn()).logits, whole(drawn()).p, whole(drawn()).v
    off = VIDEO[:, None] & VIDEO & (EYE == 0)
    in_video = logits.masked_fill(off, -math.inf).softmax(-1)
    out = served(drawn(), identity_attention("video"))
    assert apart(out[0], in_video @ v) < 1e-14
    assert torch.equal(out[:, :, :TEXT], served(drawn())[:, :, :TEXT])
    assert torch.equal(served(drawn(), identity_attention("all")), drawn().v)
    assert apart(out[0, :, TEXT:], v[:, TEXT:]) > 0.5
    for u in (0.25, 0.75):
        soft = served(drawn(), identity_attention("video", strength=u))[0]
        assert apart(soft, ((1 - u) * p + u * in_video) @ v) < 1e-14
        soft = served(drawn(), identity_attention("all", strength=u))[0]
        assert apart(soft, ((1 - u) * p + u * EYE) @ v) < 1e-14


def test_video_mass_to_self_keeps_the_mass_of_the_text():
    p, v = whole(drawn()).p.clone(), whole(drawn()).v
    p[:, TEXT:, TEXT:] = torch.diag_embed(p[:, TEXT:, TEXT:].sum(-1))
    assert apart(served(drawn(), video_mass_to_self())[0], p @ v) < 1e-14


def test_uniform_and_sharpest_maps():
    logits, v = whole(drawn()).logits, whole(drawn()).v
    assert apart(served(drawn(), uniform_attention())[0], v.mean(1, keepdim=True).expand_as(v)) < 1e-14
    one_hot = (logits == logits.amax(-1, keepdim=True)).double()
    assert apart(served(drawn(), sharpest_attention())[0], one_hot @ v) < 1e-14
    text_as_ever = served(drawn(), sharpest_attention(rows=video()))
    assert torch.equal(text_as_ever[:, :, :TEXT], served(drawn())[:, :, :TEXT])


@pytest.mark.parametrize("over", ["video", "text", "all"])
def test_an_infinite_blur_is_the_mean_query(over):
    pool = {"video": VIDEO, "text": ~VIDEO, "all": VIDEO | True}[over]
    call = drawn()
    served(call, BlurQuery(over=over, strength=0.5))
    expected = call.own["q"].clone()
    expected[:, :, pool] = 0.5 * expected[:, :, pool] + 0.5 * expected[:, :, pool].mean(2, keepdim=True)
    assert apart(call.q, expected) < 1e-14
    rows = {"video": video(), "text": ~video(), "all": None}[over]
    whole_strength, mean = served(drawn(), BlurQuery(over=over)), Transfer("q", Constant("mean"), rows=rows)
    assert apart(whole_strength, served(drawn(), mean)) < 1e-13


def test_a_blur_is_a_gaussian_over_the_grid():
    sigma = (0.8, math.inf, 0.0)
    call = drawn()
    served(call, BlurQuery(sigma, rows=frames(1)))
    weights = torch.zeros(24, 24, dtype=torch.float64)
    for i in range(24):
        for j in range(24):
            weights[i, j] = math.exp(-((i // 8 - j // 8) ** 2) / (2 * 0.8**2)) * (i % 4 == j % 4)
    weights /= weights.sum(-1, keepdim=True)
    expected = call.own["q"].clone()
    expected[:, :, TEXT + 8 : TEXT + 16] = (weights @ expected[:, :, TEXT:])[:, :, 8:16]
    assert apart(call.q, expected) < 1e-13


def test_an_unturned_blur_keeps_each_query_at_its_position():
    """Equal content at every position is left as it is."""
    rope = Rope(by_axis((2, 2, 4), 100.0, torch.device("cpu")), torch.zeros(3))
    call = drawn(rope=rope)
    content = call.q[:, :, TEXT : TEXT + 1].expand(2, 3, 24, 8)
    turned = torch.stack([rope.turn(one, rope.positions(call.layout)) for one in content])
    call = drawn(rope=rope, q=torch.cat([call.q[:, :, :TEXT], turned], 2))
    served(call, BlurQuery(1.0, unturned=True))
    assert apart(call.q, call.own["q"]) < 1e-6
    plain = drawn(rope=rope, q=call.own["q"])
    served(plain, BlurQuery(1.0))
    assert apart(plain.q, plain.own["q"]) > 0.1


def test_hidden_text_is_not_in_the_mean_query():
    call = hidden()
    served(call, BlurQuery(over="text"))
    own = call.own["q"]
    assert apart(call.q[0, :, 24:26], own[0, :, 24:26].mean(1, keepdim=True).expand(3, 2, 8)) < 1e-14
    assert torch.equal(call.q[0, :, 26:], own[0, :, 26:])


@pytest.mark.parametrize("quarter", ["tt", "tv", "vt", "vv"])
@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_region_masks_renormalise_or_zero(quarter, strength):
    region = AREAS[quarter[0]][:, None] & AREAS[quarter[1]]
    p, v = whole(drawn()).p, whole(drawn()).v
    left = torch.where(region, (1 - strength) * p, p)
    out = served(drawn(), MaskRegion(quarter, "zero", strength=strength))
    assert apart(out[0], left @ v) < 1e-6
    out = served(drawn(), MaskRegion(quarter, strength=strength))
    assert apart(out[0], left / left.sum(-1, keepdim=True) @ v) < 1e-6


def test_a_region_mask_that_hides_every_key_is_refused():
    with pytest.raises(PlanError, match=r"MaskRegion\(vv, renormalise\).*hides all keys"):
        served(hidden((24, 24)), MaskRegion("vv"))


@pytest.mark.parametrize("path", ["slerp", "chord", "log"])
def test_paths_lead_from_the_map_to_the_identity(path, monkeypatch):
    """The explicit weights come 5 rows at a time."""
    monkeypatch.setattr("probe.weigh_rows._CHUNK_BYTES", 8 * 3 * 29 * 5)
    p, v = whole(drawn()).p, whole(drawn()).v
    assert apart(served(drawn(), PathToIdentity(path))[0], v) < 1e-3
    assert apart(served(drawn(), PathToIdentity(path, strength=1e-9))[0], p @ v) < 1e-6
    for u in (0.3, 0.75):
        out = served(drawn(), PathToIdentity(path, strength=u, rows=video()))[0]
        moved = p.clone()
        for h in range(3):
            for i in range(TEXT, 29):
                moved[h, i] = on_path(path, p[h, i], i, u)
        assert apart(moved.sum(-1), torch.ones(3, 29)) < 1e-12
        assert apart(out, moved @ v) < 1e-12


def on_path(path, row, i, u):
    if path == "log":
        moved = (EYE[i] + 1e-6) ** u * row ** (1 - u)
        return moved / moved.sum()
    if path == "chord":
        moved = (u * EYE[i] + (1 - u) * row.sqrt()) ** 2
        return moved / moved.sum()
    angle = torch.acos(row[i].sqrt())
    there, here = torch.sin(u * angle) / torch.sin(angle), torch.sin((1 - u) * angle) / torch.sin(angle)
    return (there * EYE[i] + here * row.sqrt()) ** 2


def test_what_does_not_fit_is_refused():
    for wrong, said in (
        (lambda: identity_attention("text"), "of video or all rows. Got 'text'"),
        (lambda: BlurQuery(-1.0), "one sigma >= 0, or three. Got -1.0"),
        (lambda: BlurQuery((1.0, 2.0)), "one sigma >= 0, or three"),
        (lambda: BlurQuery(1.0, over="text"), "infinite over text or all. Got sigma 1.0 over 'text'"),
        (lambda: MaskRegion("tx"), "take away tt, tv, vt or vv, by renormalise or zero. Got 'tx'"),
        (lambda: PathToIdentity("geodesic"), "slerp, chord or log. Got 'geodesic'"),
    ):
        with pytest.raises(UsageError, match=said):
            wrong()
    with pytest.raises(PlanError, match="must not change the same tensor"):
        served(drawn(), PathToIdentity("slerp"), PathToIdentity("log"))


@pytest.mark.filterwarnings("ignore:In CPU autocast")  # Mochi's own, on every CPU
@pytest.mark.parametrize("family", ["cogvideox", "mochi", "hunyuan", "wan"])
def test_perturbations_through_the_families(family):
    """Text first, ragged, hidden, and apart from the video; the identities against a patch with a whole matrix."""
    bench = bench_of(Case(family))
    at = Where(layers=0, branches=Which(guided=True), kinds=bench.family.kinds - {"cross"})
    for name, edit in EDITS.items():
        if name == "mask" and family == "wan":  # without text in the sequence there are no quarters
            continue
        latents = bench.latents(edit(where=at))
        assert torch.isfinite(latents).all()
        assert not torch.equal(latents, bench.plain)
        if name in ("identity of video", "identity of all"):
            assert apart(latents, patched(bench, name == "identity of all")) < 1e-5


def patched(bench, everywhere):
    """The latents of the stock pipeline, whose first layer attends by explicit weights of its conditional entries."""
    (inputs, *_) = arguments_of(bench.pipe.transformer, bench.latents)
    layout = bench.family.layout(bench.pipe.transformer, inputs)

    def attend(call, run, q, k, v):
        out, total = run(q, k, v).clone(), q.shape[-2]
        if call.layer or not call.conditional or bench.kind_of(call) == "cross":
            return out
        video_rows = layout.with_text(total - layout.grid.size).video_slice
        own, mask = torch.eye(total, dtype=torch.bool), run.keywords.get("attn_mask")
        seen = torch.ones(len(q), 1, total, total, dtype=torch.bool)
        if everywhere:
            seen = seen & own
        else:
            seen = seen if mask is None else seen & mask
            seen[..., video_rows, video_rows] = own[video_rows, video_rows]
        logits = (q.double() @ k.double().mT * q.shape[-1] ** -0.5).masked_fill(~seen, -math.inf)
        rows = list(call.conditional)
        out[rows] = (logits.softmax(-1) @ v.double()).to(v.dtype)[rows]
        return out

    with followed(bench.pipe, bench.turns, attend):
        return bench.latents()
