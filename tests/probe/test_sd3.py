"""SD3 and SD3.5: the image first, a word in the CLIP part and in the T5 part, image-only attention, skipped layers."""

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch

import probe
from probe.models.sd3 import SD3
from probe.plan import Handler, Stage
from probe.tap import Tap
from tests import tiny
from tests.oracle import patched_attention, weights
from tests.toys import sd3

TEXT = sd3.CLIP + tiny.TEXT
JOINT = sd3.PATCHES + TEXT
CAT = [3, 79]  # behind CLIP's start, "a" and "red"; the T5 part has no start
REAL = [*range(7), *range(77, 83)]  # start, five words and end; five words and end


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


@dataclass(eq=False)
class Double(Handler):
    """v twice as large."""

    where: probe.Where
    stage = Stage.EDIT
    touches = frozenset("v")

    def serve(self, call, rows):
        call.rebind(v=call.v * 2)


def stock_calls(pipe, **call):
    """The stock latents, and q, k of the blocks' attention in order, seen by torch alone."""
    seen = []

    def keep(plain, q, k, v, **rest):
        if q.shape[-2] in (JOINT, sd3.PATCHES):
            seen.append((q.clone(), k.clone()))
        return plain(q, k, v, **rest)

    with patched_attention(keep):
        return sd3.latents(pipe, **call), seen


def text_of(pipe, prompt, **call):
    """The text [B, T, E] the transformer gets."""
    seen = []
    take = lambda module, args, kwargs: seen.append(kwargs["encoder_hidden_states"])  # noqa: E731
    handle = pipe.transformer.register_forward_pre_hook(take, with_kwargs=True)
    sd3.latents(pipe, prompt, steps=1, guidance_scale=1.0, **call)
    handle.remove()
    return seen[0]


def failed(pipe, family):
    with Tap(pipe.transformer, family) as tap:
        return [finding.sentence for finding in probe.prove(pipe, tap) if not finding.passed]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dual", [(), sd3.DUAL])
def test_a_sound_model_passes(dual, dtype):
    findings = probe.prove(sd3.pipeline(dual, dtype=dtype))
    assert len(findings) == 5
    assert all(finding.passed for finding in findings), findings
    assert "5 calls in all" in findings[1].sentence or not dual


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda layout: replace(layout, order="text-video"), "The layout must name the rows of text tokens."),
        (lambda layout: replace(layout, grid=probe.Grid(1, 6, 4)), "The layout must name the rows of top row tokens."),
    ],
    ids=["order", "grid"],
)
def test_a_wrong_layout_does_not_pass(change, sentence):
    family = replace(SD3, layout=lambda model, inputs: change(SD3.layout(model, inputs)))
    (said,) = failed(sd3.pipeline(), family)
    assert said.startswith(sentence)


def test_odd_latents_lose_their_last_row():
    pipe, seen = sd3.pipeline(), []
    inputs = SD3.probe_inputs(pipe.transformer) | {"hidden_states": torch.zeros(1, 4, 9, 13)}
    with Tap(pipe.transformer, SD3) as tap, torch.no_grad():
        tap.observe = lambda call: seen.append(call.layout.grid.shape)
        pipe.transformer(**inputs)
    assert seen == [(1, 4, 6)] * sd3.LAYERS


def test_maps_and_masses_equal_the_matrix():
    pipe = sd3.pipeline()
    plain, calls = stock_calls(pipe)
    maps, mass = probe.WordMaps("cat", per_head=True), probe.RegionMass()
    traced = probe.trace(pipe, maps, mass)
    assert torch.equal(sd3.latents(traced), plain)
    assert traced.layout == probe.TokenLayout("video-text", TEXT, probe.Grid(1, 4, 6))
    assert len(calls) == len(maps.values) == len(mass.values) == 3 * sd3.LAYERS
    word, real = [sd3.PATCHES + i for i in CAT], [sd3.PATCHES + i for i in REAL]
    groups = [real, sorted({*range(sd3.PATCHES, JOINT)} - {*real}), [*range(sd3.PATCHES)]]
    for nth, (q, k) in enumerate(calls):
        step, layer, _ = sd3.place(nth)
        p = weights(q, k)[1].numpy()  # [unconditional, conditional]
        (at,) = maps.at(step=step, layer=layer)
        vt, tv = p[:, : sd3.PATCHES, word].mean(-1), p[:, word, : sd3.PATCHES].mean(1)
        for direction, expected in (("vt", vt), ("tv", tv)):
            got = maps.values[at][direction][:, 0].reshape(2, -1)
            assert np.abs(got / (expected * JOINT) - 1).max() < 2e-5
        table = np.stack([[p[:, r][:, :, c].sum(-1).mean(-1) for c in groups] for r in groups]).transpose(2, 0, 1)
        same, other = table[..., 2:] * [[0], [0], [1]], table[..., 2:] * [[1], [1], [0]]
        assert np.abs(mass.values[at] - np.concatenate([table[..., :2], same, other], -1)).max() < 5e-6


def test_a_word_is_where_the_text_changes():
    """CLIP is causal, so its rows change from the word on; T5, its own mixing switched off, changes at the word."""
    pipe = sd3.pipeline()
    torch.nn.init.zeros_(pipe.text_encoder_3.encoder.block[0].layer[0].SelfAttention.o.weight)
    tokenize = probe.trace(pipe).tokenize
    for prompt, other, word in [
        (tiny.PROMPT, "a red dog runs left", "cat"),
        ("a cat on grass", "a cat on red snow and", "grass"),  # three pieces
        ("the cat sits on the cat", "the cat runs on the cat", "sits"),
    ]:
        changed = (text_of(pipe, prompt) != text_of(pipe, other)).any(-1)[0].nonzero().flatten().tolist()
        (cut,) = tokenize([prompt])
        tokens = cut.tokens_of(word)
        assert len(cut.ids) == TEXT
        assert [i for i in changed if i < sd3.CLIP] == list(range(tokens[0], sd3.CLIP))
        assert [i for i in changed if i >= sd3.CLIP] == [i for i in tokens if i >= sd3.CLIP]
    assert list(tokenize([tiny.PROMPT])[0].tokens_of("cat")) == CAT
    assert list(tokenize(["A Cat on grass"])[0].tokens_of("grass")) == [4, 5, 6, 80, 81, 82]
    assert [i for i, padding in enumerate(tokenize([tiny.PROMPT])[0].padding) if not padding] == REAL


def test_without_t5_its_tokens_are_padding():
    pipe = sd3.pipeline(t5=False)
    text = text_of(pipe, tiny.PROMPT)
    assert text.shape[1] == TEXT
    assert text[:, sd3.CLIP :].abs().max() == 0
    assert text[:, : sd3.CLIP].abs().min(1).values.max() > 0
    (cut,) = probe.trace(pipe).tokenize([tiny.PROMPT])
    assert cut.tokens_of("cat") == (3,)
    assert cut.padding == tuple(i > 6 for i in range(TEXT))
    maps = probe.WordMaps("cat")
    sd3.latents(probe.trace(pipe, maps), steps=1)
    assert len(maps.values) == sd3.LAYERS


def test_the_length_of_the_t5_part_is_the_calls():
    pipe = sd3.pipeline()
    keep = Keep()
    traced = probe.trace(pipe, keep)
    sd3.latents(traced, steps=1, max_sequence_length=9)
    assert traced.layout.text == sd3.CLIP + 9
    assert {len(prompt.ids) for call in keep.calls.values() for prompt in call.prompts} == {sd3.CLIP + 9}


def test_the_image_attends_to_itself_in_some_layers():
    pipe = sd3.pipeline(sd3.DUAL)
    plain, calls = stock_calls(pipe, steps=2)
    keep, mass = Keep(), probe.RegionMass()
    assert torch.equal(sd3.latents(probe.trace(pipe, keep, mass), steps=2), plain)
    sites = list(keep.calls)
    assert [(site.step, site.layer, site.call) for site in sites] == [sd3.place(i, sd3.DUAL) for i in range(len(calls))]
    assert [site.kind for site in sites] == ["self" if site.call else "joint" for site in sites]
    for site, (q, k) in zip(sites, calls, strict=True):
        call = keep.calls[site]
        assert torch.equal(call.q, q)
        assert torch.equal(call.k, k)
        assert call.rows.text == call.columns.text == (0 if site.call else TEXT)
    assert {at.kind for at in mass.values} == {"joint"}


def test_an_edit_of_the_second_attention_stays_there():
    pipe = sd3.pipeline(sd3.DUAL)
    twice = lambda plain, q, k, v, **rest: plain(q, k, v * (2 if q.shape[-2] == sd3.PATCHES else 1), **rest)  # noqa: E731
    with patched_attention(twice):
        expected = sd3.latents(pipe)
    got = sd3.latents(probe.trace(pipe, Double(probe.Where(kinds={"self"}))))
    assert torch.equal(got, expected)
    assert not torch.equal(got, sd3.latents(pipe))


@pytest.mark.parametrize("dual", [(), sd3.DUAL])
def test_nothing_reads_the_last_text_rows(dual):
    """They are queries all the same: the last block takes the text as context only."""
    pipe = sd3.pipeline(dual)
    plain = sd3.latents(pipe, steps=1)
    heard = [
        not torch.equal(sd3.latents(probe.trace(pipe, Silence(probe.Where(layers=i, kinds={"joint"}))), steps=1), plain)
        for i in range(sd3.LAYERS)
    ]
    assert heard == [True, True, False]


def test_a_forward_with_skipped_layers_belongs_to_its_step():
    pipe, keep = sd3.pipeline(), Keep()
    skip = {"skip_guidance_layers": [1], "skip_layer_guidance_stop": 0.9, "skip_layer_guidance_scale": 5.0}
    plain = sd3.latents(pipe, [tiny.PROMPT, tiny.OTHER], **skip)
    assert not torch.equal(plain, sd3.latents(pipe, [tiny.PROMPT, tiny.OTHER]))
    maps = probe.WordMaps("cat", "dog")
    assert torch.equal(sd3.latents(probe.trace(pipe, keep, maps), [tiny.PROMPT, tiny.OTHER], **skip), plain)
    both = [(step, 0, layer) for step in range(3) for layer in range(3)]
    skipped = [(step, 1, layer) for step in (1, 2) for layer in (0, 2)]
    assert sorted((site.step, site.turn, site.layer) for site in keep.calls) == sorted(both + skipped)
    halves = [(0, False), (1, False), (0, True), (1, True)]
    for site, call in keep.calls.items():
        assert [(branch.prompt, branch.guided) for branch in call.branches] == (halves[2:] if site.turn else halves)
    assert {at.turn for at in maps.values} == {0, 1}
