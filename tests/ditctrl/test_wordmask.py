"""Mask-guided sharing against dense masks in the literal pair loop, float64."""

from dataclasses import replace

import pytest
import torch

import probe
from ditctrl.objects import OfPrompts, OfSegments, pairs
from ditctrl.sharing import Chunks, Window, share_previous, shared_where
from ditctrl.wordmask import WordMasks, keep_apart, normalised, up_to
from probe.errors import UsageError, WordError
from probe.site import Branch, Where
from tests import tiny
from tests.ditctrl.test_method import STEPS, Both
from tests.toys import cogvideox

KINDS = ["2B", "5B", "1.5"]  # sincos, rotary, and a token frame of two latent frames
CAT, RED, DOG, SNOW, THIRD = 2, 1, 2, 5, 1  # places of the words in the three prompts


@pytest.fixture(scope="module", params=[{}, {"rotary": True}, {"rotary": True, "patch_size_t": 2}], ids=KINDS)
def pipe(request):
    made = cogvideox.pipeline(**request.param, layers=3)
    for part in (made.transformer, made.text_encoder):
        torch.nn.Module.to(part, torch.float64)
    return made


def drawn(both):
    config, seed = both.loop.config, torch.Generator().manual_seed(0)
    size = (1, both.segments.frames, 4, config.sample_height, config.sample_width)
    return torch.randn(size, dtype=torch.float64, generator=seed)


def column(*weighted):
    made = torch.zeros(tiny.TEXT, dtype=torch.float64)
    for place, weight in weighted:
        made[place] += weight
    return made


def masked(both, phrases, chunks=None, region="vt"):
    pairing = OfSegments(both.segments, phrases)
    where = Where(steps=both.window.steps, layers=up_to(both.window.layers))
    masks = WordMasks(pairing, where, region=region)
    both.traced = probe.trace(
        both.loop.pipe,
        masks,
        share_previous(both.segments, where=shared_where(both.window)),
        keep_apart(masks, shared_where(both.window)),
    )
    x = drawn(both)
    chunks = chunks or Chunks()
    return x, both.run(lambda clock: [replace(both.method(clock), chunks=chunks)(x, step) for step in range(STEPS)])


def clean(both, x, v, step):
    a = both.loop.scheduler.alphas_cumprod[both.loop.timesteps[step]].double()
    return a.sqrt() * x - (1 - a).sqrt() * v


def agrees(both, x, outputs):
    for step, v in enumerate(outputs):
        assert (clean(both, x, v, step) - both.oracle.x0(x, step)).abs().max() < 1e-11 * v.abs().max()


@pytest.mark.parametrize("chunks", [Chunks(), Chunks(1), Chunks(2, again=True)])
@pytest.mark.parametrize("region", ["vt", "mean"])
def test_two_prompts_with_an_object_of_another_name(pipe, chunks, region):
    both = Both(pipe, 2, 2, 2)
    both.oracle.columns = [
        (column((CAT, 1)), column((CAT, 2 / 3), (SNOW, 1 / 3))),
        (column((CAT, 2 / 3), (SNOW, 1 / 3)), column((CAT, 1 / 3), (SNOW, 2 / 3))),
        (column((CAT, 1 / 3), (SNOW, 2 / 3)), column((SNOW, 1))),
    ]
    both.oracle.both_regions = region == "mean"
    x, outputs = masked(both, (("cat", "snow"),), chunks, region)
    agrees(both, x, outputs)
    assert (clean(both, x, outputs[0], 0) - replace(both.oracle, columns=None).x0(x, 0)).abs().max() > 1e-4


def test_phrases_of_several_tokens_and_other_objects_at_the_next_turn(pipe):
    both = Both(pipe, 3, 1, 2, repeats=(1, 2, 1))
    first, half = column((RED, 1), (CAT, 1)), column((RED, 0.5), (CAT, 0.5), (DOG, 0.5))
    then = column((4, 0.5), (THIRD, 0.5))  # "on" in the second prompt, "cat" in the third
    both.oracle.columns = [
        (first, half),
        (half, column((DOG, 1))),
        (column((4, 1)), column((4, 1))),  # two segments of the second prompt follow the turn behind them
        (column((4, 1)), then),
        (then, column((THIRD, 1))),
    ]
    agrees(both, *masked(both, (("red cat", "dog"), ("on", "cat"))))


def test_masks_are_made_of_the_layers_up_to_this_one_in_steps_that_share(pipe):
    both = Both(pipe, 2, 2, 2)
    seen = []

    class Noted(WordMasks):
        def serve(self, call, rows):
            seen.append((call.site.step, call.site.layer))
            assert all(call.branches[row].guided for row in rows)
            super().serve(call, rows)

    masks = Noted(OfSegments(both.segments, (("cat", "dog"),)), Where(steps=both.window.steps, layers=up_to([2])))
    both.traced = probe.trace(
        pipe,
        masks,
        share_previous(both.segments, where=shared_where(both.window)),
        keep_apart(masks, shared_where(both.window)),
    )
    x = drawn(both)
    both.run(lambda clock: [both.method(clock)(x, step) for step in range(STEPS)])
    assert seen == [(step, layer) for step in (0, 1) for layer in range(3)]


def test_each_frame_has_an_inside():
    values = torch.tensor([0.0, 1.0, 2.0, 4.0, 5.0, 5.0, 5.0, 5.0 + 1e-5])
    made = normalised(values, 2).view(2, 4)
    assert made[0].tolist() == pytest.approx([0, 0.25, 0.5, 1], abs=1e-6)
    assert made[1, 3] > 0.9
    assert (normalised(torch.ones(8), 2) == 0).all()


def test_pairs_are_made_of_one_phrase_of_phrases_or_of_pairs():
    assert pairs(3, "cat") == (("cat", "cat"), ("cat", "cat"))
    assert pairs(3, ["cat", "dog", "fox"]) == (("cat", "dog"), ("dog", "fox"))
    assert pairs(3, [["cat", "dog"], ["sun", "moon"]]) == (("cat", "dog"), ("sun", "moon"))
    assert pairs(1, "cat") == (("cat", "cat"),)


def test_prompts_side_by_side():
    pairing = OfPrompts(0, ("cat", "dog"))
    assert pairing.source(Branch(prompt=1)) == Branch(prompt=0)
    assert pairing.source(Branch(prompt=0)) is None
    assert pairing.said(Branch(prompt=0), lends=True) == ((0, "cat", 1.0),)
    assert pairing.said(Branch(prompt=0), lends=False) == ()
    assert pairing.said(Branch(prompt=1), lends=False) == ((1, "dog", 1.0),)


def test_what_cannot_be_is_refused(pipe):
    both = Both(pipe, 3, 1, 2)
    with pytest.raises(UsageError, match="one pair for each of 2 turns"):
        OfSegments(both.segments, (("cat", "dog"),))
    with pytest.raises(WordError, match="horse"):
        masked(both, (("cat", "horse"), ("dog", "cat")))


def test_a_source_that_is_evaluated_again_begins_its_masks_anew(pipe):
    both = Both(pipe, 2, 1, 2, window=Window(range(0, 2), range(1, 3)))
    both.oracle.columns = [
        (column((CAT, 1)), column((CAT, 0.5), (DOG, 0.5))),
        (column((CAT, 0.5), (DOG, 0.5)), column((DOG, 1))),
    ]
    agrees(both, *masked(both, (("cat", "dog"),), Chunks(1, again=True)))
