"""HunyuanVideo's own: a prompt inside a template, and a mask that hides the padding at the end."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE

import probe
from probe.plan import Handler, Stage
from tests import tiny
from tests.toys import hunyuan

OWN = {"template": "the {} and a dog<|eot_id|>", "crop_start": 2}


class Keep(Handler):
    where, stage = probe.Where(), Stage.USED

    def begin(self, prompts, steps, layers):
        self.calls = []

    def serve(self, call, rows):
        self.calls.append(call)


@pytest.fixture(scope="module")
def pipe():
    return hunyuan.pipeline()


def test_the_template_is_the_pipelines_own(pipe):
    (encoder,) = probe.trace(pipe).family.encoders(pipe, {})
    assert (encoder.template, encoder.crop) == tuple(DEFAULT_PROMPT_TEMPLATE.values())
    assert encoder.length == tiny.TEXT
    (prompt,) = probe.trace(pipe).tokenize(["a red cat"])
    assert prompt.pieces[:5] == ("a", " red", " cat", "<|eot_id|>", "<pad>")
    assert prompt.padding == (False,) * 4 + (True,) * 8


def test_a_template_of_ones_own_is_followed(pipe):
    """The words of the template are no words of the prompt."""
    maps = probe.WordMaps("dog")
    call = {"prompt_template": OWN, "max_sequence_length": 8}
    hunyuan.latents(probe.trace(pipe, maps), "a dog on snow", steps=1, **call)
    (prompt,) = probe.trace(pipe).tokenize(["a dog on snow"], **call)
    assert prompt.pieces == (" a", " dog", " on", " snow", " and", " a", " dog", "<|eot_id|>")
    assert prompt.tokens_of("dog") == (1,)
    assert prompt.padding == (False,) * 8


@pytest.mark.parametrize("wrong", [{"crop_start": None}, {"crop_start": 0}, {"image_emb_len": 576}])
def test_a_template_whose_words_cannot_be_placed_is_refused(pipe, wrong):
    with pytest.raises(probe.MmditError, match="must say its crop_start and hold text alone"):
        probe.trace(pipe).tokenize(["a dog"], prompt_template=OWN | wrong)


def test_hidden_padding_can_be_cut_away():
    """In float64: what an entry says without the hidden keys is what the masked matrix says."""
    pipe, keep = hunyuan.pipeline(torch.float64), Keep()
    hunyuan.latents(probe.trace(pipe, keep), [tiny.PROMPT, "a dog sits on the red grass and snow"], steps=1)
    assert [call.visible for call in keep.calls[::4]] == [(24, 28), (19, 19)]
    for call in keep.calls:
        for row, seen in enumerate(call.visible):
            entry = call.entry(row)
            logits = call.q[row] @ call.k[row].mT / 4
            logits = logits.masked_fill(~call.mask[row, 0], -torch.inf)[:, :seen]
            assert (entry.lse - logits.logsumexp(-1)).abs().max() < 1e-12
            assert (entry.weights() - logits.softmax(-1)[..., :seen]).abs().max() < 1e-12
            assert logits.softmax(-1)[..., seen:].sum() == 0
            assert (
                F.scaled_dot_product_attention(entry.q, entry.k, entry.v) - call.out[row, :, :seen]
            ).abs().max() < 1e-12
