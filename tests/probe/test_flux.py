"""FLUX: the text first, T5 words alone, the grid read from position ids, two lists of blocks, two forwards a step."""

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline

import probe
from probe.models.flux import FLUX, grid_of
from probe.plan import Handler, Stage
from probe.tap import Tap
from tests import tiny
from tests.oracle import patched_attention, weights
from tests.toys import flux

JOINT = tiny.TEXT + flux.PATCHES
SIZES = [(4, 6), (6, 4), (3, 7), (1, 5), (5, 1), (1, 1)]


@dataclass(eq=False)
class Keep(Handler):
    """The calls by their site."""

    where: probe.Where = field(default_factory=probe.Where)
    stage = Stage.USED

    def begin(self, prompts, steps, layers):
        self.calls = {}

    def serve(self, call, rows):
        self.calls[call.site] = call


@dataclass(eq=False)
class Silence(Handler):
    """The output of the text rows is zero."""

    where: probe.Where
    stage = Stage.MERGE
    touches = frozenset({"out"})

    def serve(self, call, rows):
        out = call.out.clone()
        out[:, :, call.layout.text_slice] = 0
        call.out = out


def stock_calls(pipe, **call):
    """The stock latents, and q, k of the blocks' attention in order, seen by torch alone."""
    seen = []

    def keep(plain, q, k, v, **rest):
        if q.shape[-2] == JOINT:
            seen.append((q.clone(), k.clone()))
        return plain(q, k, v, **rest)

    with patched_attention(keep):
        return flux.latents(pipe, **call), seen


def ids_of(height, width, dtype=torch.float32):
    """Position ids as the pipeline makes them."""
    return FluxPipeline._prepare_latent_image_ids(1, height, width, "cpu", dtype)


def failed(pipe, family):
    with Tap(pipe.transformer, family) as tap:
        return [finding.sentence for finding in probe.prove(pipe, tap) if not finding.passed]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("distilled", [True, False])
def test_a_sound_model_passes(distilled, dtype):
    findings = probe.prove(flux.pipeline(distilled, dtype))
    assert len(findings) == 5
    assert all(finding.passed for finding in findings), findings


def test_the_wrong_order_does_not_pass():
    swapped = replace(FLUX, layout=lambda *forward: replace(FLUX.layout(*forward), order="video-text"))
    (said,) = failed(flux.pipeline(), swapped)
    assert said.startswith("The layout must name the rows of text tokens.")


def test_rows_and_columns_taken_for_each_other_do_not_pass():
    def swapped(model):
        inputs = FLUX.probe_inputs(model)
        return inputs | {"img_ids": inputs["img_ids"][:, [0, 2, 1]]}

    (said,) = failed(flux.pipeline(), replace(FLUX, probe_inputs=swapped))
    assert said.startswith("The image tokens must be one picture, row after row. Got 24 tokens")


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_the_grid_is_how_the_pipeline_packs(height, width):
    """A latent picture that shows its own coordinates: token y * width + x holds the 2 x 2 pixels of (y, x)."""
    rows, columns = torch.meshgrid(torch.arange(2 * height), torch.arange(2 * width), indexing="ij")
    picture = torch.stack([rows // 2, columns // 2])[None]
    packed = FluxPipeline._pack_latents(picture, 1, 2, 2 * height, 2 * width)[0]
    grid = grid_of(ids_of(height, width))
    assert grid == probe.Grid(1, height, width)
    for y in range(height):
        for x in range(width):
            assert packed[y * grid.width + x].tolist() == [y] * 4 + [x] * 4


def test_a_batch_of_ids_and_rounded_ids_have_the_same_grid():
    assert grid_of(ids_of(3, 7).expand(2, -1, -1)) == probe.Grid(1, 3, 7)
    rounded = ids_of(300, 270, torch.bfloat16)
    assert rounded[:, 1].unique().numel() < 300
    assert grid_of(rounded) == probe.Grid(1, 300, 270)


def second(ids):
    """As Kontext marks the tokens of a reference picture."""
    return ids + torch.tensor([1, 0, 0])


@pytest.mark.parametrize(
    "ids",
    [
        torch.cat([ids_of(4, 6), second(ids_of(4, 6))]),
        torch.cat([ids_of(4, 6), second(ids_of(2, 3))]),
        torch.cat([ids_of(4, 6), second(ids_of(8, 6)[24:])]),
        ids_of(4, 6)[:-1],
        ids_of(4, 6).view(4, 6, 3).transpose(0, 1).flatten(0, 1),
        ids_of(4, 6)[torch.arange(24) ^ 1],
        ids_of(4, 6).flip(0),
        ids_of(4, 6) + 1,
        ids_of(4, 6)[:0],
    ],
    ids=["beside", "smaller", "below", "one is missing", "by column", "shuffled", "backwards", "from one", "none"],
)
def test_ids_that_are_no_grid_are_refused(ids):
    with pytest.raises(probe.MmditError, match="must be one picture, row after row. Got .* Leave out reference pict"):
        grid_of(ids)


def test_the_picture_of_a_call_has_its_own_grid():
    pipe, keep = flux.pipeline(), Keep()
    traced = probe.trace(pipe, keep)
    flux.latents(traced, steps=1, height=20, width=12)
    assert traced.layout == probe.TokenLayout("text-video", tiny.TEXT, probe.Grid(1, 5, 3))


@pytest.mark.parametrize("branches", [flux.BRANCHES, ("cond",)])
def test_maps_and_masses_equal_the_matrix(branches):
    pipe, call = flux.pipeline(), {} if len(branches) == 2 else {"true_cfg_scale": 1.0}
    plain, calls = stock_calls(pipe, **call)
    maps, mass, keep = probe.WordMaps("cat", per_head=True), probe.RegionMass(), Keep()
    assert torch.equal(flux.latents(probe.trace(pipe, maps, mass, keep), **call), plain)
    assert len(calls) == len(keep.calls) == 3 * flux.LAYERS * len(branches)
    assert len(maps.values) == len(mass.values) == 3 * flux.LAYERS
    words, end, image = [2], [0, 1, 2, 3, 4, 5], [*range(tiny.TEXT, JOINT)]  # "cat"; five words and the end
    groups = [end, [*range(6, tiny.TEXT)], image]
    for nth, ((q, k), (site, seen)) in enumerate(zip(calls, keep.calls.items(), strict=True)):
        step, layer, name = flux.place(nth, branches)
        assert (site.step, site.turn, site.layer) == (step, branches.index(name), layer)
        assert [branch.guided for branch in seen.branches] == [name == "cond"]
        assert torch.equal(seen.q, q)
        if name == "uncond":
            continue
        (at,) = maps.at(step=step, layer=layer)
        p = weights(q, k)[0].numpy()
        vt, tv = p[:, image][:, :, words].mean(-1), p[:, words][:, :, image].mean(1)
        for direction, expected in (("vt", vt), ("tv", tv)):
            got = maps.values[at][direction][:, 0].reshape(2, -1)
            assert np.abs(got / (expected * JOINT) - 1).max() < 2e-5
        table = np.stack([[p[:, r][:, :, c].sum(-1).mean(-1) for c in groups] for r in groups]).transpose(2, 0, 1)
        same, other = table[..., 2:] * [[0], [0], [1]], table[..., 2:] * [[1], [1], [0]]
        assert np.abs(mass.values[at] - np.concatenate([table[..., :2], same, other], -1)).max() < 5e-6


def test_the_rows_of_the_text_are_t5_tokens():
    """T5, its own mixing switched off, changes at the word; CLIP's vector is no row."""
    pipe, seen = flux.pipeline(), []
    torch.nn.init.zeros_(pipe.text_encoder_2.encoder.block[0].layer[0].SelfAttention.o.weight)
    take = lambda module, args, kwargs: seen.append(kwargs["encoder_hidden_states"])  # noqa: E731
    pipe.transformer.register_forward_pre_hook(take, with_kwargs=True)
    for prompt in (tiny.PROMPT, "a red dog runs left"):
        flux.latents(pipe, prompt, steps=1, true_cfg_scale=1.0)
    changed = (seen[0] != seen[1]).any(-1)[0].nonzero().flatten().tolist()
    (cut,) = probe.trace(pipe).tokenize([tiny.PROMPT])
    assert seen[0].shape[1] == len(cut.ids) == tiny.TEXT
    assert changed == list(cut.tokens_of("cat")) == [2]
    assert cut.padding == tuple(i > 5 for i in range(tiny.TEXT))


def test_layers_are_counted_through_both_lists_of_blocks():
    pipe, keep = flux.pipeline(), Keep(probe.Where(kinds={"single"}))
    flux.latents(probe.trace(pipe, keep), steps=1, true_cfg_scale=1.0)
    assert [site.layer for site in keep.calls] == [2, 3, 4]
    slots = FLUX.slots(pipe.transformer)
    assert [(slot.layer, slot.kind) for slot in slots] == [
        *((i, "double") for i in range(2)),
        *((i, "single") for i in range(2, 5)),
    ]
    assert slots[2].module is pipe.transformer.single_transformer_blocks[0].attn


@pytest.mark.parametrize("true_cfg_scale", [1.0, 3.0])
def test_distilled_guidance_makes_no_second_half(true_cfg_scale):
    """guidance_scale is 3.5 by default, and a batch of two is two prompts all the same."""
    pipe, keep, maps = flux.pipeline(), Keep(), probe.WordMaps("cat", "dog")
    prompts, call = [tiny.PROMPT, tiny.OTHER], {"steps": 1, "true_cfg_scale": true_cfg_scale}
    plain = flux.latents(pipe, prompts, **call)
    assert torch.equal(flux.latents(probe.trace(pipe, keep, maps), prompts, **call), plain)
    assert {site.turn for site in keep.calls} == ({0, 1} if true_cfg_scale > 1 else {0})
    for site, seen in keep.calls.items():
        assert [(branch.prompt, branch.guided) for branch in seen.branches] == [(i, site.turn == 0) for i in (0, 1)]
    assert set(maps.words_of.values()) == {("cat",), ("dog",)}


def test_nothing_reads_the_last_text_rows():
    pipe = flux.pipeline()
    plain = flux.latents(pipe, steps=1)
    heard = [
        not torch.equal(flux.latents(probe.trace(pipe, Silence(probe.Where(layers=i))), steps=1), plain)
        for i in range(flux.LAYERS)
    ]
    assert heard == [True, True, True, True, False]
