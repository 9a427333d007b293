"""The fast schedule against the literal pair loop, float64."""

from dataclasses import replace

import pytest
import torch

import probe
from control.adapter import Loop
from control.denoise import State, denoise
from control.schedule import dynamic_guidance
from ditctrl import MultiPrompt, Segments, Window, share_previous
from ditctrl.sharing import Chunks, layer_passes, reference_passes, shared_where
from probe.errors import UsageError
from tests import tiny
from tests.ditctrl.pair_loop import PairLoop

STEPS, PEAK = 5, 4.0
PROMPTS = [tiny.PROMPT, tiny.OTHER, "the cat sits on grass"]


@pytest.fixture(scope="module", params=[False, True], ids=["sincos", "rotary"])
def pipe(request):
    return tiny.pipeline(rotary=request.param, dtype=torch.float64)


class Both:
    """The method and its oracle for the same numbers."""

    def __init__(self, pipe, prompts, transitions, overlap, window="scaled", repeats=(), variant="code"):
        self.loop = Loop(pipe, STEPS, seed=5, sampler="dpm")
        self.segments = Segments(prompts, self.loop.clip_frames, overlap, transitions, repeats, variant)
        self.window = Window.scaled(STEPS, 3) if window == "scaled" else window
        self.prompts = PROMPTS[:prompts]
        self.text = self.loop.encode(self.prompts)
        self.traced = probe.trace(
            pipe, *([share_previous(self.segments, where=shared_where(self.window))] if self.window else [])
        )
        self.oracle = PairLoop(
            pipe.transformer,
            self.text,
            self.segments.length,
            overlap,
            transitions,
            PEAK,
            self.loop.timesteps,
            self.loop.scheduler.alphas_cumprod,
            self.window.steps if self.window else range(0),
            self.window.layers if self.window else range(0),
            self.loop._rotary(self.segments.length),
            repeats,
            interior=0.5 if variant == "paper" else 1.0,
        )

    def method(self, clock):
        scale = lambda t: dynamic_guidance(t, STEPS, PEAK)  # noqa: E731
        zeros = torch.zeros_like(self.text[:1])
        return MultiPrompt(self.loop, self.segments, self.text, zeros, scale, self.window, clock)

    def run(self, drive):
        with torch.no_grad():
            return self.traced.run(drive, self.prompts)


GEOMETRY = [
    (2, 2, 2, ()),
    (2, 1, 1, ()),
    (3, 1, 2, ()),
    (2, 0, 1, ()),
    (3, 0, 0, ()),
    (3, 1, 2, (1, 2, 1)),
    (2, 0, 1, (3, 2)),
]


@pytest.mark.parametrize(("prompts", "transitions", "overlap", "repeats"), GEOMETRY)
def test_each_prediction_equals_the_pair_loop(pipe, prompts, transitions, overlap, repeats):
    both = Both(pipe, prompts, transitions, overlap, repeats=repeats)
    assert both.window == Window(range(0, 2), range(2, 3))
    assert both.segments.frames == both.oracle.frames
    x = torch.randn(1, both.segments.frames, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    outputs = both.run(lambda clock: [both.method(clock)(x, step) for step in range(STEPS)])
    for step, v in enumerate(outputs):
        a = both.loop.scheduler.alphas_cumprod[both.loop.timesteps[step]].double()
        clean = a.sqrt() * x - (1 - a).sqrt() * v
        assert (clean - both.oracle.x0(x, step)).abs().max() < 1e-12 * v.abs().max()


def test_a_longer_single_prompt_and_the_weights_of_the_paper_equal_the_pair_loop(pipe):
    for both in (Both(pipe, 1, 2, 1, repeats=Segments.alone(2, 2)), Both(pipe, 2, 2, 2, variant="paper")):
        assert both.segments.count == 4
        x = torch.randn(1, both.segments.frames, 4, 8, 8, dtype=torch.float64)
        outputs = both.run(lambda clock: [both.method(clock)(x, step) for step in (0, 4)])  # noqa: B023
        for step, v in zip((0, 4), outputs, strict=True):
            a = both.loop.scheduler.alphas_cumprod[both.loop.timesteps[step]].double()
            assert (a.sqrt() * x - (1 - a).sqrt() * v - both.oracle.x0(x, step)).abs().max() < 1e-12 * v.abs().max()
    doubled = replace(both.oracle, interior=1.0)
    assert (doubled.x0(x, 0) - both.oracle.x0(x, 0)).abs().max() > 1e-6  # far above the 1e-12 of the comparison


def test_the_sharing_matters(pipe):
    both = Both(pipe, 2, 2, 2)
    x = torch.randn(1, both.segments.frames, 4, 8, 8, dtype=torch.float64)
    without = replace(both.oracle, steps=range(0))
    assert (both.oracle.x0(x, 0) - without.x0(x, 0)).abs().max() > 1e-4  # far above the 1e-12 of the comparison
    assert torch.equal(both.oracle.x0(x, 4), without.x0(x, 4))


def test_the_whole_loop_equals_the_pair_loop(pipe):
    both = Both(pipe, 2, 2, 2)
    start = State.start(both.loop, 1, both.segments.frames, torch.float64)
    done = both.run(lambda clock: denoise(both.loop, both.method(clock), start))
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(start.latents.shape, generator=generator, dtype=torch.float64)
    assert torch.equal(noise, start.latents)
    expected = both.oracle.sample(noise, generator)
    # the scheduler computes its coefficients in float32
    assert (done.latents - expected).abs().max() < 2e-5 * expected.abs().max()


def test_without_sharing_each_segment_is_computed_once(pipe):
    both = Both(pipe, 2, 2, 2, window=None)
    x = torch.randn(1, both.segments.frames, 4, 8, 8, dtype=torch.float64)
    v = both.run(lambda clock: both.method(clock)(x, 0))
    a = both.loop.scheduler.alphas_cumprod[both.loop.timesteps[0]].double()
    assert (a.sqrt() * x - (1 - a).sqrt() * v - both.oracle.x0(x, 0)).abs().max() < 1e-12 * v.abs().max()
    assert both.traced.passes == 2 * 4 * 3


def test_equal_entries_are_computed_once_up_to_the_layer_that_shares(pipe):
    both = Both(pipe, 2, 2, 2)
    x = torch.randn(1, both.segments.frames, 4, 8, 8, dtype=torch.float64)
    both.run(lambda clock: [both.method(clock)(x, step) for step in range(STEPS)])
    per_step = layer_passes(both.segments, both.window, STEPS, 3)
    assert per_step == [2 * (2 * 4 + 1 * 6)] * 2 + [2 * 3 * 4] * 3
    assert both.traced.passes == sum(per_step)


def test_recording_changes_no_bit_of_the_method(pipe):
    both = Both(pipe, 2, 2, 2)
    start = State.start(both.loop, 1, both.segments.frames, torch.float64)
    plain = both.run(lambda clock: denoise(both.loop, both.method(clock), start))
    maps, mass = probe.WordMaps("cat", "dog"), probe.RegionMass()
    both.traced = probe.trace(pipe, share_previous(both.segments, where=shared_where(both.window)), maps, mass)
    again = both.run(lambda clock: denoise(both.loop, both.method(clock), start))
    assert torch.equal(plain.latents, again.latents)
    seen = {(b.segment, b.role): words for b, words in maps.words_of.items()}
    assert seen[0, "plain"] == seen[1, "source"] == ("cat",)
    assert seen[2, "target"] == seen[3, "plain"] == ("dog",)


@pytest.mark.parametrize(
    ("prompts", "transitions", "preset", "count", "frames", "pixels"),
    [
        (2, 2, 9, 4, 25, 97),
        (3, 2, 9, 7, 37, 145),
        (4, 2, 9, 10, 49, 193),
        (5, 2, 9, 13, 61, 241),
        (2, 1, 6, 3, 27, 105),
        (3, 1, 6, 5, 41, 161),
        (4, 1, 6, 7, 55, 217),
        (5, 1, 6, 9, 69, 273),
    ],
)
def test_the_authors_presets(prompts, transitions, preset, count, frames, pixels):
    segments = Segments.scaled(prompts, 13, transitions)
    assert segments.overlap == preset
    assert (segments.count, segments.frames, segments.pixel_frames()) == (count, frames, pixels)


def test_the_scaling_rule():
    assert Window.scaled(50, 30) == Window(range(2, 25), range(25, 30))
    assert Window.scaled(25, 6) == Window(range(1, 12), range(5, 6))
    assert Segments.scaled(2, 5).overlap == 3
    assert Segments.scaled(2, 5, transitions=1).overlap == 2
    assert Window.scaled(50, 42).layers == range(35, 42)  # CogVideoX-5B
    assert Window.scaled(50, 30, "paper") == Window(range(2, 26), range(25, 30))
    assert (Segments.scaled(2, 13, variant="paper").overlap, Segments.scaled(2, 13).overlap) == (6, 9)
    assert Segments.scaled(1, 13, 2, repeats=Segments.alone(5, 2)).frames == 61


@pytest.mark.parametrize(
    ("numbers", "sentence"),
    [
        ((1, 13, 9, 2), "two prompts"),
        ((2, 5, 5, 2), "shorter than a segment of 5"),
        ((2, 5, 3, -1), "transition"),
        ((2, 5, 3, 1, (1, 0)), "one whole number from 1 on for each of the 2 prompts"),
        ((2, 5, 3, 1, (1, 2, 3)), "one whole number from 1 on for each of the 2 prompts"),
    ],
)
def test_impossible_segments_are_refused(numbers, sentence):
    with pytest.raises(UsageError, match=sentence):
        Segments(*numbers)


@pytest.mark.parametrize(("prompts", "share"), [(2, 0.69), (3, 0.62), (5, 0.58)])
def test_layer_passes_beside_the_pair_loop_at_full_size(prompts, share):
    segments, window = Segments.scaled(prompts, 13), Window.scaled(50, 30)
    made, reference = sum(layer_passes(segments, window, 50, 30)), reference_passes(segments, 50, 30)
    assert reference == 4 * (segments.count - 1) * 50 * 30
    assert made / reference == pytest.approx(share, abs=0.005)


@pytest.mark.parametrize("chunks", [Chunks(1), Chunks(3), Chunks(2, device="cpu"), Chunks(2, again=True), Chunks(9)])
def test_segments_in_chunks_equal_the_pair_loop(pipe, chunks):
    both = Both(pipe, 2, 2, 2)
    share = share_previous(both.segments, chunks=chunks, where=shared_where(both.window))
    both.traced = probe.trace(pipe, share)
    x = torch.randn(1, both.segments.frames, 4, 8, 8, dtype=torch.float64)
    lent = []

    def drive(clock):
        for step in range(STEPS):
            yield replace(both.method(clock), chunks=chunks)(x, step)
            lent.append(share._from.bytes)

    outputs = both.run(lambda clock: list(drive(clock)))
    for step, v in enumerate(outputs):
        a = both.loop.scheduler.alphas_cumprod[both.loop.timesteps[step]].double()
        clean = a.sqrt() * x - (1 - a).sqrt() * v
        assert (clean - both.oracle.x0(x, step)).abs().max() < 1e-12 * v.abs().max()
    assert both.traced.passes == sum(layer_passes(both.segments, both.window, STEPS, 3, chunks))
    assert lent == [0] * STEPS  # what was lent was let go of
