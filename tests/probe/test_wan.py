"""Wan: two attentions per layer, two forwards per step, sometimes two transformers, sometimes a picture."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanImageToVideoPipeline
from PIL import Image

import probe
from probe.errors import PlanError
from probe.models.load import Bare
from probe.models.registry import family_of
from probe.plan import Handler, Stage
from tests import tiny
from tests.oracle import patched_attention, weights
from tests.toys import wan

EVERY = {wan.place(nth) for nth in range(3 * wan.CALLS_PER_STEP)}


@pytest.fixture(scope="module", params=[{}, *wan.VARIANTS.values()], ids=["2.1", *wan.VARIANTS])
def pipe(request):
    return wan.pipeline(**request.param)


@pytest.fixture(scope="module")
def plain(pipe):
    return wan.latents(pipe)


@dataclass(eq=False)
class Doubled(Handler):
    """v doubled: the simplest edit."""

    where: probe.Where = field(default_factory=probe.Where)
    stage = Stage.EDIT
    touches = frozenset("v")

    def serve(self, call, rows):
        call.rebind(v=call.v * 2)


@dataclass(eq=False)
class Seen(Handler):
    """Keeps every call by (step, layer, call, branch)."""

    where: probe.Where = field(default_factory=probe.Where)
    stage = Stage.USED

    def begin(self, prompts, steps, layers):
        self.calls = {}

    def serve(self, call, rows):
        site, (branch,) = call.site, call.branches
        self.calls[site.step, site.layer, site.call, wan.BRANCHES[not branch.guided]] = call


def patched(pipe, replacement, **call):
    """Latents with the blocks' attention calls replaced by `replacement(place, plain, q, k, v)`, found by counting."""
    count = []

    def replace(plain, q, k, v, **rest):
        if q.shape[-2] != wan.VIDEO:
            return plain(q, k, v, **rest)
        count.append(1)
        return replacement(wan.place(len(count) - 1), plain, q, k, v)

    with patched_attention(replace):
        latents = wan.latents(pipe, **call)
    assert len(count) == 3 * wan.CALLS_PER_STEP
    return latents


def keeping(kept):
    """A replacement that keeps q, k, v by place and changes nothing."""

    def keep(place, attend, q, k, v):
        kept[place] = q, k, v
        return attend(q, k, v)

    return keep


def test_both_attentions_of_every_layer_are_seen(pipe, plain):
    """And each call has the tensors an independent count finds at its place."""
    own, seen = {}, Seen()
    patched(pipe, keeping(own))
    assert torch.equal(wan.latents(probe.trace(pipe, seen)), plain)
    assert set(seen.calls) == set(own) == EVERY
    for place, tensors in own.items():
        call = seen.calls[place]
        assert all(torch.equal(one, other) for one, other in zip(tensors, (call.q, call.k, call.v), strict=True))
    for (_, _, number, _), call in seen.calls.items():
        assert call.site.kind == wan.KINDS[number]
        assert call.rows.total == wan.VIDEO == call.rows.grid.size
        assert (call.columns.text, call.columns.frames) == ((wan.TEXT, 0) if number else (0, 3))


@pytest.mark.parametrize("length", [wan.TEXT, 64])
def test_word_maps_equal_the_matrix(pipe, length):
    own, maps = {}, probe.WordMaps("cat", "red cat", directions=("vt",), per_head=True)
    wan.latents(probe.trace(pipe, maps), max_sequence_length=length)
    patched(pipe, keeping(own), max_sequence_length=length)
    assert len(maps.values) == 3 * wan.LAYERS
    for at, lift in maps.values.items():
        q, k, _ = own[at.step, at.layer, 1, "cond"]
        p = weights(q, k)[0]
        assert p.shape[-1] == length
        for word, tokens in enumerate([[2], [1, 2]]):
            expected = p[..., tokens].sum(-1) * length / len(tokens)
            got = torch.from_numpy(lift["vt"][:, word]).flatten(1).double()
            assert ((got - expected).abs() / expected.clamp_min(1)).max() < 5e-6


def test_there_are_no_text_rows(pipe):
    for directions in (("tv",), ("vt", "tv"), ("mean",)):
        with pytest.raises(PlanError, match="which reads double, joint, single attention, in a model with cross, self"):
            wan.latents(probe.trace(pipe, probe.WordMaps("cat", directions=directions)))
    mass = probe.RegionMass()
    wan.latents(probe.trace(pipe, mass))
    for table in mass.values.values():
        assert np.isnan(table[:, :2]).all()
        assert np.allclose(table[:, 2, :2].sum(-1), 1, atol=1e-5)
        assert (table[:, 2, 2:] == 0).all()


@pytest.mark.parametrize(
    "wanted", [(0, 0, 0, "cond"), (0, 1, 1, "uncond"), (2, 0, 1, "cond"), (2, 1, 0, "uncond")], ids=str
)
def test_an_edit_equals_an_independent_patch(pipe, plain, wanted):
    step, layer, number, branch = wanted
    which = probe.Which(guided=branch == "cond")
    where = probe.Where(steps=step, layers=layer, kinds={wan.KINDS[number]}, branches=which)
    edited = wan.latents(probe.trace(pipe, Doubled(where)))
    assert torch.equal(edited, patched(pipe, lambda place, attend, q, k, v: attend(q, k, v * (1 + (place == wanted)))))
    assert not torch.equal(edited, plain)


def test_the_second_transformer_takes_over():
    """Below the boundary, with the same layers: the timesteps are 999, 857 and 600 of 1000."""
    pipe, ran = wan.pipeline(boundary=0.9), []
    for model, name in ((pipe.transformer, "first"), (pipe.transformer_2, "second")):
        model.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    seen = Seen()
    wan.latents(probe.trace(pipe, seen))
    assert ran == ["first"] * 2 + ["second"] * 4
    assert set(seen.calls) == EVERY


def test_the_step_is_the_one_a_forward_is_told():
    """Whatever its timestep: whole numbers repeat at a large flow shift."""
    model, seen = wan.transformer(in_channels=4), Seen()
    inputs = family_of(model).probe_inputs(model)
    pipe = SimpleNamespace(transformer=model, scheduler=SimpleNamespace(timesteps=range(3)))

    def drive(_):
        for step in range(3):
            for name in wan.BRANCHES:
                with model.cache_context(name, step_index=step):
                    model(**inputs)

    with torch.no_grad():
        probe.trace(pipe, seen).run(drive)
    assert set(seen.calls) == EVERY


@pytest.mark.parametrize("scheduler", [UniPCMultistepScheduler, FlowMatchEulerDiscreteScheduler])
def test_its_schedulers_evaluate_once_a_step(scheduler):
    assert scheduler().order == 1


def test_each_token_may_have_its_own_timestep():
    """Wan 2.2 5B."""
    pipe, seen = wan.pipeline(expand_timesteps=True), Seen()
    assert torch.equal(wan.latents(probe.trace(pipe, seen)), wan.latents(pipe))
    assert set(seen.calls) == EVERY


@pytest.mark.parametrize("own", [False, True], ids=["beside the noise", "as the first frame"])
def test_a_picture_to_video(own):
    """Wan 2.2 puts the picture into the channels, or, with a timestep for each token, into the first frame. This
    pipeline tells no step: it is read from the timesteps.
    """
    text = wan.pipeline()
    parts = {name: text.components[name] for name in ("tokenizer", "text_encoder", "vae", "scheduler")}
    model = wan.transformer(in_channels=4 if own else 4 + 4 + 4)
    pipe = WanImageToVideoPipeline(**parts, transformer=model, expand_timesteps=own)
    pipe.set_progress_bar_config(disable=True)
    embeds, negative = text.encode_prompt(tiny.PROMPT, max_sequence_length=wan.TEXT)
    call = {"prompt": None, "prompt_embeds": embeds, "negative_prompt_embeds": negative, "num_frames": 9}
    call |= {"image": Image.new("RGB", (64, 64), "red"), "height": 64, "width": 64}
    seen = Seen()
    assert torch.equal(wan.latents(probe.trace(pipe, seen), **call), wan.latents(pipe, **call))
    assert set(seen.calls) == EVERY


def seeing(frames=0):
    """A transformer of Wan 2.1 that sees one picture, or the first and the last frame."""
    return wan.transformer(
        in_channels=12, image_dim=8, added_kv_proj_dim=24, pos_embed_seq_len=2 * 257 if frames else None
    )


@pytest.mark.parametrize("frames", [0, 2], ids=["one picture", "first and last frame"])
def test_the_keys_of_a_picture_are_passed_on_untouched(frames):
    model = seeing(frames)
    family = family_of(model)
    inputs = family.probe_inputs(model)
    rows = family.layout(model, inputs).grid.size
    lengths, seen = [], Seen()

    def double_text(plain, q, k, v, **rest):
        lengths.append(k.shape[-2])
        return plain(q, k, v * (1 + (k.shape[-2] == wan.TEXT)), **rest)

    def drive(clock):
        clock.tell(step=0, steps=1, branches=[probe.Branch()])
        return model(**inputs, return_dict=False)[0]

    with torch.no_grad():
        edited = probe.trace(Bare(model), Doubled(probe.Where(kinds={"cross"})), seen).run(drive)
        with patched_attention(double_text):
            expected = model(**inputs, return_dict=False)[0]
    assert torch.equal(edited, expected)
    assert lengths == [rows, 2 * 257 if frames else 257, wan.TEXT] * wan.LAYERS
    assert {(layer, number) for _, layer, number, _ in seen.calls} == {
        (i, j) for i in range(wan.LAYERS) for j in range(2)
    }
    assert all(finding.passed for finding in probe.prove(Bare(model)))


def test_a_self_check_sees_the_second_attention():
    """Silence the output of one cross attention: the check names its layer."""
    model = wan.transformer()
    torch.nn.init.zeros_(model.blocks[1].attn2.to_out[0].weight)
    assert "Got no change from layer 1" in probe.prove(Bare(model))[-1].sentence


@pytest.mark.parametrize("size", [(9, 64, 64), (12, 80, 112), (1, 32, 48)])
def test_the_predicted_layout_is_the_real_one(size):
    pipe = wan.pipeline()
    call = dict(zip(("num_frames", "height", "width"), size, strict=True)) | {"max_sequence_length": 32}
    traced = probe.trace(pipe)
    wan.latents(traced, steps=1, **call)
    assert family_of(pipe.transformer).clip(pipe.transformer.config, call) == traced.layout
    large = {**pipe.transformer.config, "out_channels": 48}
    assert family_of(pipe.transformer).clip(large, {**call, "height": 704, "width": 1280}).grid.shape[1:] == (22, 40)
