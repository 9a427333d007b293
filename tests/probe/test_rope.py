"""Rope equals what each model does to its queries and keys."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import probe
from probe.layout import Grid, TokenLayout
from probe.models.registry import family_of
from probe.models.rope import Rope, by_axis
from probe.models.wan import WAN
from probe.tap import Tap
from tests.toys import Case
from tests.toys.bench import Keep
from tests.toys.stock import arguments_of

pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast")

ROTARY = [Case("cogvideox", "rotary"), Case("cogvideox", "1.5"), *map(Case, ("hunyuan", "mochi", "flux", "wan"))]
TABLES = {"HunyuanVideo": "rope", "Mochi": "rope", "Wan": "rope", "FLUX": "pos_embed"}
"""The module that makes the cosines and sines of a forward; CogVideoX is given them."""


def first_call(model: Any, inputs: dict[str, Any]) -> Any:
    """The first attention call of layer 0."""
    calls = []
    with Tap(model, family_of(model)) as tap, torch.no_grad():
        tap.observe = calls.append
        model(**inputs)
    return calls[0]


def still(tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Cosines and sines of no rotation."""
    return torch.ones_like(tables[0]), torch.zeros_like(tables[1])


def unrotated(model: Any, inputs: dict[str, Any]) -> Any:
    """The first call of a model whose tables say that nothing turns."""
    if "image_rotary_emb" in inputs:
        return first_call(model, {**inputs, "image_rotary_emb": still(inputs["image_rotary_emb"])})
    handle = getattr(model, TABLES[family_of(model).name]).register_forward_hook(lambda *told: still(told[-1]))
    try:
        return first_call(model, inputs)
    finally:
        handle.remove()


@pytest.fixture(scope="module", params=ROTARY, ids=str)
def pair(request):
    """The first call of a guided run, and the same without rotation."""
    case = request.param
    pipe = case.pipeline()
    (inputs, *_) = arguments_of(pipe.transformer, lambda: case.toy.latents(pipe, steps=2))
    return first_call(pipe.transformer, inputs), unrotated(pipe.transformer, inputs)


def test_rope_turns_what_the_model_projects_into_what_it_attends_with(pair):
    call, plain = pair
    video, positions = call.rows.video_slice, call.rope.positions(call.rows)
    assert positions.shape == (call.layout.grid.size, 3)
    for name in ("q", "k"):
        for entry in range(len(call.q)):
            before, after = getattr(plain, name)[entry], getattr(call, name)[entry]
            assert not torch.allclose(before, after, atol=0.1)
            assert (call.rope.turn(before[:, video], positions) - after[:, video]).abs().max() < 2e-5
            text = torch.ones(call.rows.total, dtype=torch.bool)
            text[video] = False
            assert torch.equal(before[:, text], after[:, text])


def test_turning_back_takes_the_rotation_off(pair):
    call, plain = pair
    video, positions = call.rows.video_slice, call.rope.positions(call.rows)
    assert (call.rope.turn(call.k[0][:, video], -positions) - plain.k[0][:, video]).abs().max() < 2e-5


def test_two_turns_are_one_turn_by_the_sum(pair):
    call, _ = pair
    x = call.q[0][:, call.rows.video_slice]
    one, other = torch.randn(x.shape[1], 3, generator=torch.Generator().manual_seed(0)), (0.5, -2.0, 3.0)
    both = call.rope.turn(call.rope.turn(x, one), other)
    assert torch.allclose(both, call.rope.turn(x, one + torch.tensor(other)), atol=2e-5)
    assert torch.equal(call.rope.turn(x, (0, 0, 0)), x)


def test_some_heads_turn_as_among_all(pair):
    call, _ = pair
    x = call.q[0][:, call.rows.video_slice]
    assert torch.equal(call.rope.turn(x[1:], (1, 2, 3), heads=(1,)), call.rope.turn(x, (1, 2, 3))[1:])


def test_an_axis_turns_alone(pair):
    """What all axes do together is what each does after the other."""
    call, _ = pair
    x, shift = call.q[0][:, call.rows.video_slice], (1.0, 2.0, 3.0)
    each = x
    for axis in range(3):
        part = call.rope.only((axis,))
        moved = part.turn(x, shift)
        others = [0.0 if at != axis else shift[at] for at in range(3)]
        assert torch.equal(moved, call.rope.turn(x, others))
        each = part.turn(each, shift)
    assert torch.allclose(each, call.rope.turn(x, shift), atol=1e-5)


def test_a_band_holds_its_share_of_the_frequencies_of_each_axis(pair):
    call, _ = pair
    rope = call.rope
    low, high = (rope.only(band=(side, 0.5)).frequencies for side in ("low", "high"))
    for axis in range(3):
        for head in range(rope.frequencies.shape[1]):
            own = rope.frequencies[axis, head]
            slow = sorted(own[own != 0].abs().tolist())
            half = round(len(slow) / 2)
            assert sorted(low[axis, head][low[axis, head] != 0].abs().tolist()) == slow[:half]
            assert sorted(high[axis, head][high[axis, head] != 0].abs().tolist()) == slow[-half:] * (half > 0)
    assert torch.equal(rope.only(band=("low", 1.0)).frequencies, rope.frequencies)


def test_models_without_rotation_have_no_rope():
    for case in (Case("cogvideox"), Case("sd3"), Case("sd3", "3.5")):
        pipe, keep = case.pipeline(), Keep()
        case.toy.latents(probe.trace(pipe, keep), steps=2)
        assert {call.rope for call in keep.calls} == {None}


def test_cross_attention_has_no_rope():
    pipe, keep = Case("wan").pipeline(), Keep()
    Case("wan").toy.latents(probe.trace(pipe, keep), steps=2)
    assert all((call.rope is None) == (call.site.kind == "cross") for call in keep.calls)


def test_a_picture_of_another_shape_keeps_its_own_spacing():
    """CogVideoX squeezes the rows and columns of another aspect ratio into those it was trained on."""
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    model = Case("cogvideox", "rotary").pipeline().transformer
    grid = Grid(3, 4, 8)
    table = get_3d_rotary_pos_embed(16, ((1, 0), (3, 4)), (4, 8), 3)
    inputs = {
        "hidden_states": torch.zeros(1, 3, 4, 8, 16),
        "encoder_hidden_states": torch.zeros(1, 12, 16),
        "image_rotary_emb": table,
    }
    rope = family_of(model).rope(model, inputs)
    angles = rope.angles(rope.positions(TokenLayout("text-video", 12, grid)))[0]
    assert torch.allclose(angles.cos(), table[0][:, ::2], atol=1e-5)
    assert torch.allclose(angles.sin(), table[1][:, ::2], atol=1e-5)
    assert torch.allclose(rope.frequencies[2, 0], by_axis((4, 6, 6), 1e4, torch.device("cpu"))[2, 0] / 2, rtol=1e-4)


def test_wan_deals_its_channels_out_unevenly():
    """16 channels: 8 for the frames, 4 for rows and for columns."""
    from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

    model, latents = SimpleNamespace(rope=WanRotaryPosEmbed(16, (1, 2, 2), 32)), torch.zeros(1, 4, 3, 8, 12)
    rope = WAN.rope(model, {"hidden_states": latents})
    assert rope is not None
    angles = rope.angles(rope.positions(TokenLayout("video-text", 0, Grid(3, 4, 6))))[0]
    cos, sin = (table[0, :, 0, ::2] for table in model.rope(latents))
    assert torch.allclose(angles.cos(), cos, atol=1e-5)
    assert torch.allclose(angles.sin(), sin, atol=1e-5)


def test_half_precision_is_rounded_once():
    """The turn itself is made in float32."""
    rope = Rope(by_axis((4, 6, 6), 1e4, torch.device("cpu")), torch.zeros(3))
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(rope.turn(x, (1, 2, 3)), rope.turn(x.float(), (1, 2, 3)).bfloat16())
