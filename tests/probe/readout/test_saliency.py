"""Output-space saliency against the attention written out in float64."""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

import probe
from probe.plan import Handler, Stage
from probe.readout.saliency import OutputSaliency
from tests import tiny
from tests.oracle import weights
from tests.probe.readout import calls
from tests.probe.readout.calls import GRID, matrix, one_call

BOUND = {torch.float64: 1e-6, torch.float32: 5e-6, torch.bfloat16: 1e-2}
WORDS = {"cat": [2], "red cat": [1, 2]}


def seen(readout, call):
    call.run_with_lse()
    return calls.value_of(readout, call)


def slow(call, per_head):
    """cosine and dot [heads or 1, words, video], one token at a time."""
    p = matrix(call)
    out = p @ call.v[0].double().numpy()[:, : p.shape[-1]]
    vectors = out if per_head else np.concatenate(out, -1)[None]
    text = [i for i, (kind, _) in enumerate(calls.tokens(call, "rows")) if kind != "video"]
    video = calls.where(call, "rows", "video")
    cosine, dot = np.zeros((2, len(vectors), len(WORDS), len(video)))
    for h, x in enumerate(vectors):
        for w, tokens in enumerate(WORDS.values()):
            word = np.mean([x[text[token]] for token in tokens], 0)
            for i, token in enumerate(video):
                dot[h, w, i] = x[token] @ word
                cosine[h, w, i] = dot[h, w, i] / np.linalg.norm(x[token]) / np.linalg.norm(word)
    return {"cosine": cosine, "dot": dot}


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("given", calls.JOINT, ids=str)
@pytest.mark.parametrize("per_head", [True, False])
def test_output_saliency_equals_the_matrix(dtype, given, per_head):
    call = one_call(dtype, **given)
    readout = OutputSaliency(*WORDS, "dog", per_head=per_head)
    value = seen(readout, call)
    assert readout.words_of[probe.Branch()] == tuple(WORDS)
    for name, expected in slow(call, per_head).items():
        assert value[name].shape == (*expected.shape[:2], *GRID.shape)
        bound = BOUND[dtype] * max(1, np.abs(expected).max())
        np.testing.assert_allclose(value[name].reshape(expected.shape), expected, atol=bound)


def test_a_token_with_the_output_of_the_word_has_cosine_one():
    call = one_call()
    call.run_with_lse()
    call.out[:, :, 7 + 5] = 3 * call.out[:, :, 2]
    call.out[:, :, 7 + 6] = -call.out[:, :, 2]
    call.out[:, :, 7 + 7] = 0
    cosine = calls.value_of(OutputSaliency("cat"), call)["cosine"].reshape(-1)
    np.testing.assert_allclose(cosine[[5, 6, 7]], [1, -1, 0], atol=1e-6)


def test_heads_can_be_chosen():
    call = one_call()
    every = seen(OutputSaliency("cat", per_head=True), call)
    second = seen(OutputSaliency("cat", where=probe.Where(heads=1)), call)
    np.testing.assert_allclose(second["dot"][0], every["dot"][1], rtol=1e-6)


def test_what_it_cannot_show_is_refused():
    with pytest.raises(probe.MmditError, match="must have at least one word. Got none"):
        OutputSaliency()
    with pytest.raises(probe.MmditError, match="A word must be in a prompt. Got 'dog'. The words are: a, red, cat"):
        tiny.latents(probe.trace(tiny.pipeline(), OutputSaliency("cat", "dog")), steps=1)
    with pytest.raises(probe.MmditError, match="must select attention of a kind it can read"):
        probe.Plan([OutputSaliency("cat")], 2, 3, kinds=("self", "cross"))
    with pytest.raises(probe.MmditError, match="must look after the attention"):
        OutputSaliency("cat", stage=probe.Stage.BEFORE)


@dataclass(eq=False)
class KeepCalls(Handler):
    where: probe.Where = field(default_factory=probe.Where)
    stage = Stage.USED

    def begin(self, prompts, steps, layers):
        self.calls = {}

    def serve(self, call, rows):
        self.calls[call.site.layer] = call


def test_saliency_of_a_run_reads_the_output_of_its_own_branch():
    """Two prompts in one batch: each branch shows its own word, and no bit of the video changes."""
    pipe, readout, keep = tiny.pipeline(), OutputSaliency("cat", "dog"), KeepCalls()
    prompts = [tiny.PROMPT, tiny.OTHER]
    latents = tiny.latents(probe.trace(pipe, readout, keep), prompts, steps=1)
    assert torch.equal(latents, tiny.latents(pipe, prompts, steps=1))
    conditional = [probe.Branch(prompt=n) for n in (0, 1)]
    assert readout.words_of == dict(zip(conditional, [("cat",), ("dog",)], strict=True))
    assert len(readout.values) == 2 * 3
    for at, value in readout.values.items():
        call = keep.calls[at.layer]
        out = (weights(call.q, call.k) @ call.v.double())[call.branches.index(at.branch)]
        x = out.transpose(0, 1).flatten(1)
        word, video = x[2], x[tiny.TEXT :]  # cat and dog are both the third token
        dot = video @ word
        np.testing.assert_allclose(value["dot"].reshape(-1), dot, atol=1e-5 * dot.abs().max().item())
        cosine = dot / video.norm(dim=-1) / word.norm()
        np.testing.assert_allclose(value["cosine"].reshape(-1), cosine, atol=5e-6)
    layout = probe.TokenLayout("text-video", tiny.TEXT, probe.Grid(3, 4, 4))
    assert readout.cost(layout) == pytest.approx(2 / 60)
