"""A mask from a concept stream, against the attention of each call written out in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import probe
from control.concept import ConceptMask
from control.extract import ExtractMask
from control.transfer import Transfer
from probe import region
from probe.errors import UsageError
from probe.readout.saliency import OutputSaliency
from probe.site import Branch
from tests import tiny
from tests.oracle import weights
from tests.toys.bench import Keep

STEPS = 2
BOTH = [tiny.PROMPT, tiny.OTHER]  # the video, and the prompt whose words look at it
STREAM = Transfer("qkv", 0, 1, rows=region.video())


@pytest.fixture(scope="module")
def pipe():
    return tiny.pipeline(dtype=torch.float64)


def traced(pipe, *handlers, prompts=BOTH):
    return tiny.latents(probe.trace(pipe, *handlers), prompts, steps=STEPS)


def outputs(call, prompt):
    """The attention output of the conditional branch of a prompt, heads side by side, [N, H D]."""
    out = (weights(call.q, call.k) @ call.v.double())[call.branches.index(Branch(prompt=prompt))]
    return out.transpose(0, 1).flatten(1).numpy()


def shares(call, words):
    """The share of the first word in a softmax over words of <video output, word output>, [video]."""
    video, text = outputs(call, 0)[tiny.TEXT :], outputs(call, 1)
    dots = np.array([[row @ np.mean([text[token] for token in tokens], 0) for tokens in words] for row in video])
    powers = np.exp(dots - dots.max(1, keepdims=True))
    return powers[:, 0] / powers.sum(1)


def test_a_concept_mask_is_the_softmax_over_the_words_of_the_outputs(pipe):
    mask, keep = ConceptMask("dog", 1, ("snow", "a"), video=0, per="none"), Keep()
    traced(pipe, STREAM, mask, keep)
    words = [[2], [5], [0]]  # a blue dog sits on snow
    expected = np.mean([shares(call, words) for call in keep.calls], 0)
    assert len(keep.calls) == 3 * STEPS
    np.testing.assert_allclose(mask.score(1).ravel(), expected, rtol=1e-9)


def test_the_concept_stream_looks_and_is_not_looked_at(pipe):
    mask = ConceptMask("dog", 1, ("snow",), video=0)
    with_concepts = traced(pipe, STREAM, mask)
    assert torch.equal(with_concepts[0], traced(pipe)[0])
    other = traced(pipe, STREAM, prompts=[tiny.OTHER, tiny.OTHER])
    assert not torch.equal(with_concepts[0], other[0])


def test_saliency_in_another_video_reads_the_words_of_its_own_branch(pipe):
    own, other, keep = OutputSaliency("dog"), OutputSaliency("dog", video_from=0), Keep()
    traced(pipe, own, other, keep)
    for at, value in other.values.items():
        call, _ = keep.found(at)
        dot = outputs(call, 0)[tiny.TEXT :] @ outputs(call, 1)[2]
        np.testing.assert_allclose(value["dot"].ravel(), dot, rtol=1e-5, atol=1e-6 * np.abs(dot).max())
        assert not np.allclose(value["dot"], own.values[at]["dot"])
    assert len(other.values) == 3 * STEPS


def test_what_has_no_rival_or_no_video_is_refused(pipe):
    with pytest.raises(UsageError, match="must have rivals to be told from. Got none for ConceptMask\\(dog\\)"):
        ConceptMask("dog", 1)
    with pytest.raises(UsageError, match="must have it in the same call. Got none of conditional prompt 1"):
        traced(pipe, OutputSaliency("cat", video_from=1), prompts=tiny.PROMPT)
    assert isinstance(ConceptMask("dog", 1, ("a",)), ExtractMask)
