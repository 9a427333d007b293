"""A sound model passes; each sabotage fails with its own sentence."""

from dataclasses import dataclass, replace

import pytest
import torch
from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0

import probe
from probe import TokenLayout, attend
from probe.attend import State
from probe.models.prove import prove
from probe.models.registry import family_of
from probe.tap import Tap
from tests import tiny


def failed(pipe, sabotage=None, family=None):
    with Tap(pipe.transformer, family or family_of(pipe.transformer)) as tap:
        if sabotage:
            sabotage(pipe.transformer)
        return [finding.sentence for finding in prove(pipe, tap) if not finding.passed]


@pytest.mark.parametrize("rotary", [False, True])
def test_a_sound_model_passes(rotary):
    findings = probe.prove(tiny.pipeline(rotary))
    assert len(findings) == 5
    assert all(finding.passed for finding in findings), findings


def test_the_miniature_passes():
    assert all(finding.passed for finding in probe.prove(probe.load("miniature")))


def test_fused_after_tapping():
    sentences = failed(tiny.pipeline(), lambda model: model.fuse_qkv_projections())
    assert any("Got no call at all: the processors were replaced after tapping, as fuse_qkv" in s for s in sentences)


def test_one_tap_bypassed():
    def bypass(model):
        model.transformer_blocks[1].attn1.processor = CogVideoXAttnProcessor2_0()

    sentences = failed(tiny.pipeline(), bypass)
    assert any("Got none from layers [1]: these bypass it" in s for s in sentences)


def test_a_layer_that_attends_twice():
    def twice(model):
        processor = model.transformer_blocks[0].attn1.processor
        real = type(processor).__call__

        def call(self, *arguments, **rest):
            real(self, *arguments, **rest)
            return real(self, *arguments, **rest)

        processor.__class__ = type("Twice", (type(processor),), {"__call__": call})

    assert "more calls from layers [0]" in failed(tiny.pipeline(), twice)[0]


def test_frames_in_another_order():
    pipe = tiny.pipeline()
    family = family_of(pipe.transformer)

    @dataclass(frozen=True)
    class Backwards(TokenLayout):
        def frame_slice(self, frame):
            return super().frame_slice(self.grid.frames - 1 - frame)

    def backwards(model, inputs):
        layout = family.layout(model, inputs)
        return Backwards(layout.order, layout.text, layout.grid)

    sentences = failed(pipe, family=replace(family, layout=backwards))
    assert len(sentences) == 1
    assert "the rows of frame 0 tokens" in sentences[0]


@pytest.mark.parametrize("broken", ["tapped", "recorded"])
def test_bits_that_change(monkeypatch, broken):
    pipe = tiny.pipeline()

    def sabotage(model):
        if broken == "recorded":
            real = attend.plain
            monkeypatch.setattr(attend, "plain", lambda *a: State(real(*a).out * 1.01, real(*a).lse))
        else:
            processor = model.transformer_blocks[1].attn1.processor
            call = type(processor).__call__
            louder = lambda *a, **k: tuple(x * 1.01 for x in call(*a, **k))  # noqa: E731
            processor.__class__ = type("Louder", (type(processor),), {"__call__": louder})

    sentences = failed(pipe, sabotage)
    assert len(sentences) == 1
    assert f"The {broken} model must give the plain model's bits" in sentences[0]


def test_the_seam_itself_is_examined(monkeypatch):
    def nothing(call, plan):
        """Serve nobody."""

    monkeypatch.setattr("probe.serve.before_attention", nothing)
    with pytest.raises(AssertionError):
        test_a_sound_model_passes(False)


def test_text_and_video_swapped():
    pipe = tiny.pipeline()
    family = family_of(pipe.transformer)

    def swapped(model, inputs):
        return replace(family.layout(model, inputs), order="video-text")

    sentences = failed(pipe, family=replace(family, layout=swapped))
    assert len(sentences) == 1
    assert "Text and video are in another order" in sentences[0]


def test_an_output_projection_is_zero():
    pipe = tiny.pipeline()
    torch.nn.init.zeros_(pipe.transformer.transformer_blocks[2].attn1.to_out[0].weight)
    sentences = failed(pipe)
    assert len(sentences) == 1
    assert "Got no change from layer 2: its output projection is zero" in sentences[0]
