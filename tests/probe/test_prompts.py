"""Which prompt the words of a call belong to, where a pipeline has several text encoders."""

import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler

import probe
from probe.clock import branches_of, step_of, steps_of
from probe.errors import TapError, WordError
from tests import tiny
from tests.toys import flux, sd3, wan


def pieces(pipe, **call):
    (prompt,) = probe.trace(pipe).tokenize([tiny.PROMPT], **call)
    return prompt


def test_words_are_those_of_the_encoder_that_makes_the_tokens():
    prompt = pieces(flux.pipeline(), prompt_2=tiny.OTHER)
    assert prompt.text == tiny.OTHER
    assert prompt.has("dog")
    assert not prompt.has("cat")


def test_encoders_with_different_prompts_show_no_word():
    pipe, maps = sd3.pipeline(), probe.WordMaps("cat")
    assert probe.trace(pipe).tokenize([tiny.PROMPT], prompt_3=tiny.OTHER) == ()
    assert pieces(pipe, prompt_3=tiny.PROMPT).has("cat")
    with pytest.raises(WordError, match="must know the prompt"):
        sd3.latents(probe.trace(pipe, maps), prompt_3=tiny.OTHER, steps=1)


def test_a_missing_encoder_gives_padding():
    pipe = sd3.pipeline()
    places = pieces(pipe).tokens_of("cat")
    pipe.text_encoder_3 = None
    assert pieces(pipe).tokens_of("cat") == places[:1]
    assert len(places) == 2


def test_skip_layer_guidance_is_conditional_whatever_its_batch():
    pipe, seen = sd3.pipeline(), []

    class Watch(probe.RegionMass):
        def serve(self, call, rows):
            seen.append((call.site.step, call.site.turn, tuple(branch.guided for branch in call.branches)))

    watch = Watch(where=probe.Where(layers=1))
    layers = {"skip_guidance_layers": [0], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    with torch.no_grad():
        sd3.latents(probe.trace(pipe, watch), steps=2, num_images_per_prompt=2, **layers)
    halves = (False, False, True, True)
    assert set(seen) == {(0, 0, halves), (1, 0, halves), (1, 1, (True, True))}  # the pipeline starts after step 0


def test_words_lie_where_the_cleaned_prompt_has_them():
    (prompt,) = probe.trace(wan.pipeline()).tokenize(["a  red&nbsp;cat   runs left"])
    assert prompt.text == tiny.PROMPT
    assert prompt.tokens_of("cat") == (2,)


def test_a_half_of_guidance_that_nobody_names_is_refused():
    pipe = type("Unnamed", (), {"do_classifier_free_guidance": True})()
    assert [b.guided for b in branches_of(2, 1, 1, None, pipe)] == [False, True]
    assert [b.guided for b in branches_of(1, 1, 1, "uncond", pipe)] == [False]
    with pytest.raises(TapError, match="must be named or hold both halves"):
        branches_of(1, 1, 1, None, pipe)


def test_several_videos_of_a_prompt_are_copies():
    pipe = type("Guiding", (), {"do_classifier_free_guidance": True})()
    found = [(b.prompt, b.copy, b.guided) for b in branches_of(8, 2, 2, None, pipe)]
    half = [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert found == [(*one, guided) for guided in (False, True) for one in half]
    off = branches_of(4, 2, 2, "cond_uncond", pipe)
    assert [b.guided for b in off] == [True] * 4
    maps = probe.WordMaps("cat")
    sd3.latents(probe.trace(sd3.pipeline(), maps), steps=1, num_images_per_prompt=2)
    assert {(at.branch.prompt, at.branch.copy) for at in maps.values} == {(0, 0), (0, 1)}


def test_guidance_that_changes_with_the_steps_changes_no_label():
    """At some steps dynamic guidance rounds to 1."""
    maps, pipe = probe.WordMaps("cat", where=probe.Where(branches=lambda branch: branch.guided)), tiny.pipeline()
    tiny.latents(probe.trace(pipe, maps), steps=11, use_dynamic_cfg=True)
    assert len(maps.values) == 11 * 3
    assert {at.branch for at in maps.values} == {probe.Branch()}


def test_positional_prompts_count():
    maps, pipe = probe.WordMaps("dog"), flux.pipeline()
    call = {"height": 32, "width": 32, "num_inference_steps": 1, "output_type": "latent", "max_sequence_length": 12}
    probe.trace(pipe, maps)(tiny.PROMPT, tiny.OTHER, **call)
    assert set(maps.words_of.values()) == {("dog",)}


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch's own, under autocast
@pytest.mark.parametrize("toy", [sd3, flux], ids=lambda toy: toy.FAMILY)
def test_readouts_keep_their_precision_under_autocast(toy):
    pipe, looks = toy.pipeline(), (probe.TokenMass(), probe.RegionMass())
    with torch.autocast("cpu", torch.bfloat16):
        plain = toy.latents(pipe, steps=1)
        assert torch.equal(toy.latents(probe.trace(pipe, *looks), steps=1), plain)
    for at, table in looks[1].values.items():
        assert abs(looks[0].values[at]["video"].sum(-1) - table[:, 2, :2].sum(-1)).max() < 1e-4


def test_a_sampler_of_second_order_counts_a_step_once_whoever_tells_it():
    sampler = FlowMatchHeunDiscreteScheduler()
    sampler.set_timesteps(3)
    assert steps_of(sampler) == 3
    assert [step_of(sampler, told) for told in range(5)] == [0, 0, 1, 1, 2]
    assert step_of(sampler) is None
