"""Changes of latents: blends by masks, noise of long videos, overlapping windows."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from control.adapter import Loop
from control.denoise import Lockstep, State, denoise
from control.latent import Blend, LatentEdit, Moment
from control.noise import LowPass, NoiseShuffle, Nudge, renew
from control.overlap import Windows, average, starts_of, weights_of
from probe import region
from probe.errors import LayoutError, UsageError
from probe.site import Branch, Progress
from tests import tiny
from tests.toys import cogvideox

STEPS, SCALE = 4, 3.0
PROMPTS = [tiny.PROMPT, tiny.OTHER]


@pytest.fixture(scope="module")
def pipe():
    return tiny.pipeline()


@pytest.fixture
def pair():
    return torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def looped(pipe, *edits, texts=PROMPTS, sampler="model", noise="shared", keep=None, guidance=SCALE):
    loop = Loop(pipe, STEPS, seed=0, sampler=sampler, noise=noise)
    text, negative = loop.encode(texts), loop.encode([""] * len(texts))
    start = State.start(loop, len(texts), loop.clip_frames, text.dtype)
    prompts = tuple(SimpleNamespace(text=t) for t in texts)
    return denoise(loop, Lockstep(loop, text, negative, lambda t: guidance), start, keep, edits, prompts).latents


def moment(pipe, step=0):
    return Moment(Loop(pipe, STEPS, seed=0), step)


# --- the seam ---


def test_edits_see_every_step_before_and_after(pipe):
    seen = []

    class Look(LatentEdit):
        def before(self, latents, at):
            seen.append(("before", at.step, latents))
            return latents

        def after(self, latents, at):
            seen.append(("after", at.step, latents))
            assert (at.steps, at.sigma) == (STEPS, at.loop.sigma(at.step))
            assert [prompt.text for prompt in at.prompts] == PROMPTS
            return latents

    states = []
    done = looped(pipe, Look(), LatentEdit(), keep=states.append)
    assert [name[:2] for name in seen] == [(when, step) for step in range(STEPS) for when in ("before", "after")]
    for step, (_, _, after) in enumerate(seen[1::2]):
        assert torch.equal(after, states[step].latents)
        assert step + 1 == STEPS or torch.equal(seen[2 * step + 2][2], after)
    assert torch.equal(done, looped(pipe))


def test_edits_are_applied_in_their_order(pipe):
    class Plus(LatentEdit):
        def after(self, latents, at):
            return latents + (at.step == STEPS - 1)

    class Twice(LatentEdit):
        def after(self, latents, at):
            return latents * (1 + (at.step == STEPS - 1))

    plain = looped(pipe)
    assert torch.equal(looped(pipe, Plus(), Twice()), (plain + 1) * 2)
    assert torch.equal(looped(pipe, Twice(), Plus()), plain * 2 + 1)


# --- Blend ---


def test_a_blend_by_a_full_mask_changes_no_bit(pipe):
    plain = looped(pipe)
    ones = np.ones((3, 4, 4), bool)
    for mask in (ones, region.video(), torch.ones(3, 8, 8), (~ones, ones)):
        assert torch.equal(looped(pipe, Blend(0, 1, mask)), plain)
    assert torch.equal(looped(pipe, Blend(0, 1, ~ones, steps=())), plain)


def test_a_blend_by_an_empty_mask_gives_the_source(pipe):
    done = looped(pipe, Blend(0, 1, np.zeros((3, 4, 4))))
    assert torch.equal(done[1], done[0])
    assert torch.equal(done[0], looped(pipe)[0])


def test_a_blend_is_the_formula_on_the_pixels_of_each_patch(pipe, pair):
    mask = np.random.default_rng(0).random((3, 4, 4)).astype(np.float32)
    got = Blend(0, 1, mask).after(pair, moment(pipe))
    assert torch.equal(got[0], pair[0])
    for f, y, x in np.ndindex(3, 8, 8):
        m = float(mask[f, y // 2, x // 2])
        source, target = pair[0, f, :, y, x], pair[1, f, :, y, x]
        assert torch.allclose(got[1, f, :, y, x], source + m * (target - source), atol=1e-6)


def test_a_mask_of_tokens_covers_all_latent_frames_of_a_token_frame(pair):
    pipe = cogvideox.pipeline(rotary=True, patch_size_t=2)
    loop = SimpleNamespace(config=pipe.transformer.config, steps=STEPS)
    mask = np.zeros((2, 4, 4))
    mask[1] = 1
    got = Blend(0, 1, mask).after(pair, Moment(loop, 0))  # three latent frames: two token frames
    assert torch.equal(got[1, :2], pair[0, :2])
    assert torch.equal(got[1, 2], pair[1, 2])


def test_blends_by_regions_and_by_several_masks(pipe, pair):
    box = region.box(0, 0, 2, 4) & region.frames(1)
    got = Blend(0, 1, box).after(pair, moment(pipe))[1]
    assert torch.equal(got[1, :, :4], pair[1, 1, :, :4])
    assert torch.equal(got[1, :, 4:], pair[0, 1, :, 4:])
    assert torch.equal(got[0], pair[0, 0])
    joined = Blend(0, 1, (box, region.frames(2))).after(pair, moment(pipe))[1]
    assert torch.equal(joined[1], got[1])
    assert torch.equal(joined[2], pair[1, 2])


def test_a_blend_can_take_a_given_path(pipe, pair):
    path = [torch.full((3, 4, 8, 8), float(step)) for step in range(STEPS + 1)]
    got = Blend(path.__getitem__, 0, region.frames(0)).after(pair, moment(pipe, 2))
    assert torch.equal(got[0, 1:], path[3][1:])
    assert torch.equal(got[0, 0], pair[0, 0])
    assert torch.equal(got[1], pair[1])


def test_a_blend_in_some_steps(pipe):
    empty = np.zeros((3, 4, 4))
    blend = Blend(0, 1, empty, steps=Progress(0, 0.5))
    done = looped(pipe, blend)
    assert not torch.equal(done[1], done[0])
    assert not torch.equal(done[1], looped(pipe)[1])
    assert torch.equal(blend.after(done, moment(pipe, 2)), done)


def test_what_cannot_be_blended_is_refused(pipe, pair):
    with pytest.raises(LayoutError, match=r"token grid \(3, 4, 4\).*Got \(3, 4, 5\)"):
        Blend(0, 1, np.ones((3, 4, 5))).after(pair, moment(pipe))
    with pytest.raises(UsageError, match="must lie in 0 to 1"):
        Blend(0, 2, np.ones((3, 4, 4))).after(pair, moment(pipe))
    with pytest.raises(UsageError, match="mask with video tokens"):
        Blend(0, 1, region.words("cat")).after(pair, moment(pipe))


# --- noise ---


def test_prompts_start_from_the_same_noise_unless_each_has_its_own(pipe):
    shared, each = (Loop(pipe, STEPS, seed=0, noise=noise).noise(2, 3, torch.float32) for noise in ("shared", "each"))
    assert torch.equal(shared[0], shared[1])
    assert torch.equal(shared[:1], Loop(pipe, STEPS, seed=0).noise(1, 3, torch.float32))
    assert not torch.equal(each[0], each[1])


@pytest.mark.parametrize("sampler", ["ddim", "dpm"])
def test_one_prompt_twice_gives_one_video_twice(pipe, sampler):
    """Also with a sampler that draws noise in its steps."""
    twice = looped(pipe, texts=[tiny.PROMPT] * 2, sampler=sampler)
    assert torch.equal(twice[0], twice[1])
    alone = looped(pipe, texts=[tiny.PROMPT], sampler=sampler)
    assert (twice[:1] - alone).abs().max() < 1e-4 * alone.abs().max()
    apart = looped(pipe, texts=[tiny.PROMPT] * 2, sampler=sampler, noise="each")
    assert (apart[0] - apart[1]).abs().max() > 0.1 * alone.abs().max()


def test_a_nudge_scales_the_noise(pipe, pair):
    assert torch.equal(Nudge(1.15).before(pair, moment(pipe)), pair * 1.15)
    assert torch.equal(Nudge(1.15).before(pair, moment(pipe, 1)), pair)
    assert torch.equal(looped(pipe, Nudge(1.0)), looped(pipe))
    assert not torch.equal(looped(pipe, Nudge(1.15)), looped(pipe))


@pytest.mark.parametrize(("frames", "window", "stride"), [(14, 6, 2), (13, 5, 5), (16, 4, 3), (9, 4, 1)])
def test_noise_beyond_a_window_is_a_shuffled_copy(frames, window, stride):
    order = NoiseShuffle(window, stride, seed=3).order(frames)
    assert len(order) == frames
    assert order[:window] == list(range(window))
    for start in range(window, frames, stride):
        group = order[start : start + stride]
        earlier = order[start - window : start - window + stride]
        assert sorted(group) == sorted(earlier) if len(group) == stride else set(group) <= set(earlier)


def test_shuffled_noise_is_the_same_for_every_prompt_and_seeded(pipe):
    noise = torch.arange(14.0).view(1, 14, 1, 1, 1).expand(2, 14, 4, 8, 8)
    shuffled = NoiseShuffle(6, 3, seed=1).before(noise, moment(pipe))
    order = NoiseShuffle(6, 3, seed=1).order(14)
    assert shuffled[0, :, 0, 0, 0].tolist() == [float(frame) for frame in order]
    assert torch.equal(shuffled[0], shuffled[1])
    assert any(NoiseShuffle(6, 3, seed=seed).order(14) != order for seed in range(2, 6))
    assert NoiseShuffle(6, 3).order(6) == NoiseShuffle(6, 3).order(9)[:6] == list(range(6))
    assert torch.equal(NoiseShuffle(6, 3).before(noise, moment(pipe, 1)), noise)
    with pytest.raises(UsageError, match="groups of 1 to 6 frames.*Got 7"):
        NoiseShuffle(6, 7)


def slow_gain(shape, low_pass):
    """The gain frequency by frequency; index k of n is frequency k or k - n, whichever is nearer to 0."""
    gain = np.zeros(shape)
    for at in np.ndindex(*shape):
        share = [2 * min(k, n - k) / n for k, n in zip(at, shape, strict=True)]
        squared = (share[0] / low_pass.time) ** 2 + (share[1] ** 2 + share[2] ** 2) / low_pass.space**2
        gain[at] = np.exp(-squared / 2) if low_pass.shape == "gaussian" else 1 / (1 + squared**low_pass.order)
    return gain


@pytest.mark.parametrize("shape", ["gaussian", "butterworth"])
@pytest.mark.parametrize("size", [(5, 4, 6), (4, 7, 3)])
def test_the_low_pass_against_a_loop_over_frequencies(shape, size):
    low_pass = LowPass(0.25, 0.4, shape)
    gain = slow_gain(size, low_pass)
    assert np.allclose(low_pass.gain(*size), gain, atol=1e-14)
    low, high = (torch.randn(2, size[0], 3, *size[1:], dtype=torch.float64) for _ in range(2))
    mixed = low_pass.mix(low, high)
    for prompt, channel in np.ndindex(2, 3):
        parts = (np.fft.fftn(x[prompt, :, channel].numpy()) for x in (low, high))
        expected = sum(weight * part for weight, part in zip((gain, 1 - gain), parts, strict=True))
        back = np.fft.ifftn(expected)
        assert abs(back.imag).max() < 1e-12
        assert np.allclose(mixed[prompt, :, channel], back.real, atol=1e-12)


def test_a_low_pass_of_equal_parts_changes_nothing(pair):
    assert torch.equal(LowPass().mix(pair, pair), pair)
    wide = LowPass(1e6, 1e6).mix(pair, torch.zeros_like(pair))
    assert torch.allclose(wide, pair, atol=1e-6)
    with pytest.raises(UsageError, match="cutoffs and an order above 0"):
        LowPass(time=0)


def test_renewed_noise_keeps_what_is_slow_in_the_result(pipe):
    loop = Loop(pipe, STEPS, seed=0)
    start = State.start(loop, 2, 3, torch.float32)
    loop.noise(2, 3, torch.float32)  # drawn by a sampler on the way
    done = State(STEPS, torch.randn(2, 3, 4, 8, 8), None, loop.generator.get_state())
    fresh = Loop(pipe, STEPS, seed=0)
    *_, fine = (fresh.noise(2, 3, torch.float32) for _ in range(3))
    again = renew(loop, start, done, LowPass(), step=2)
    alpha = loop.scheduler.alphas_cumprod[loop.timesteps[2]]
    noised = alpha.sqrt() * done.latents + (1 - alpha).sqrt() * start.latents
    assert again.step == 2
    assert torch.allclose(again.latents, LowPass().mix(noised, (1 - alpha).sqrt() * fine), atol=1e-6)
    everything = renew(loop, start, done, LowPass(1e6, 1e6), step=2)
    assert torch.allclose(everything.latents, noised, atol=1e-5)
    assert not torch.equal(again.generator, done.generator)
    for step in (0, STEPS):
        with pytest.raises(UsageError, match=f"some of it is left.*Got {step}"):
            renew(loop, start, done, LowPass(), step)


# --- windows ---


def test_windows_cover_the_video_and_end_with_it():
    assert starts_of(25, 13, 4) == (0, 4, 8, 12)
    assert starts_of(24, 13, 4) == (0, 4, 8, 11)
    assert starts_of(13, 13, 4) == (0,)
    for numbers in ((12, 13, 4), (20, 5, 6), (20, 5, 0)):
        with pytest.raises(UsageError, match="1 <= stride <= length <= frames"):
            starts_of(*numbers)


def test_the_weights_of_a_window():
    assert weights_of(16, "triangular").tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 8, 7, 6, 5, 4, 3, 2, 1]
    assert weights_of(3, "triangular").tolist() == [1, 2, 1]
    assert weights_of(3, "uniform").tolist() == [1, 1, 1]


@pytest.mark.parametrize("shape", ["uniform", "triangular"])
def test_a_prediction_all_windows_agree_on_stays_as_it_is(shape):
    whole = torch.randn(2, 11, 4, 8, 8, dtype=torch.float64)
    windows = Windows(lambda clips, step: clips, starts_of(11, 5, 2), 5, shape)
    assert torch.allclose(windows(whole, 0), whole, atol=1e-14)
    constant = Windows(lambda clips, step: torch.full_like(clips, 0.7), starts_of(11, 5, 2), 5, shape)
    assert torch.allclose(constant(whole.float(), 0), torch.tensor(0.7), atol=1e-7)


def test_the_average_is_weighted_frame_by_frame():
    weights = weights_of(3, "triangular")
    a, b = torch.full((1, 3, 1), 1.0), torch.full((1, 3, 1), 4.0)
    mean = average(5, [(0, weights, a), (2, weights, b)])[0, :, 0]
    assert mean.tolist() == pytest.approx([1, 1, (1 * 1 + 1 * 4) / 2, 4, 4])
    uneven = average(4, [(0, weights, a), (1, weights, b)])[0, :, 0]
    assert uneven.tolist() == pytest.approx([1, (2 * 1 + 1 * 4) / 3, (1 * 1 + 2 * 4) / 3, 4])
    with pytest.raises(UsageError, match=r"cover every frame. Got none for \[3\]"):
        average(7, [(0, weights, a), (4, weights, b)])


@pytest.mark.parametrize("shape", ["uniform", "triangular"])
def test_one_window_is_the_plain_prediction(pipe, shape):
    loop = Loop(pipe, STEPS, seed=0)
    text = loop.encode(PROMPTS)
    clip = Lockstep(loop, text, text * 0, lambda t: SCALE)
    latents = torch.randn(2, 3, 4, 8, 8)
    with torch.no_grad():
        assert torch.equal(Windows(clip, (0,), 3, shape)(latents, 1), clip(latents, 1))


def test_each_window_shows_its_own_prompt(pipe):
    """Three windows of a long latent against three clips by themselves."""
    loop, starts, which = Loop(pipe, STEPS, seed=0), starts_of(6, 3, 2), (0, 1, 1)
    assert starts == (0, 2, 3)
    text = loop.encode(PROMPTS)
    shown = tuple(Branch(prompt=prompt, segment=i) for i, prompt in enumerate(which))
    negative = torch.zeros_like(text)
    together = Lockstep(loop, text[list(which)], negative[list(which)], lambda t: SCALE, shown=shown)
    assert together.branches(0) == [Branch(p, i, guided=half) for half in (False, True) for i, p in enumerate(which)]
    latents = torch.randn(1, 6, 4, 8, 8)
    with torch.no_grad():
        ours = Windows(together, starts, 3, "uniform")(latents, 0)
        total, count = torch.zeros(6, 4, 8, 8), torch.zeros(6, 1, 1, 1)
        for start, prompt in zip(starts, which, strict=True):
            one = Lockstep(loop, text[prompt : prompt + 1], negative[:1], lambda t: SCALE)
            total[start : start + 3] += one(latents[:, start : start + 3], 0)[0]
            count[start : start + 3] += 1
    assert torch.allclose(ours[0], total / count, atol=1e-5)
