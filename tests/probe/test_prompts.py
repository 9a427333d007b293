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
    assert [b.guided for b in branches_of(2, 1, None, pipe)] == [False, True]
    assert [b.guided for b in branches_of(1, 1, "uncond", pipe)] == [False]
    with pytest.raises(TapError, match="must be named or hold both halves"):
        branches_of(1, 1, None, pipe)


def test_a_sampler_of_second_order_counts_a_step_once_whoever_tells_it():
    sampler = FlowMatchHeunDiscreteScheduler()
    sampler.set_timesteps(3)
    assert steps_of(sampler) == 3
    assert [step_of(sampler, told) for told in range(5)] == [0, 0, 1, 1, 2]
    assert step_of(sampler) is None
