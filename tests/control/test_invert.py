"""Inversion against exact solutions, the formula of DDIM, and the sampler that must undo it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from control.adapter import Loop
from control.denoise import Lockstep, State, denoise
from control.invert import Follow, Trajectory, coefficients, encode, invert, plain, sampled
from probe.errors import LayoutError, UsageError
from tests import tiny

FRAMES = np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def pipe():
    return tiny.pipeline()


def angle(loop, step):
    """theta of the latents before a step, cos^2 = alpha_bar; 0 after the last."""
    after = step == loop.steps
    return 0.0 if after else torch.acos(loop.scheduler.alphas_cumprod[loop.timesteps[step]].double().sqrt()).item()


def linear(loop):
    """A prediction that is linear in the latents: its slopes and offsets, another for every value and step."""
    shape = (loop.steps, loop.clip_frames, 4, 8, 8)
    drawn = torch.Generator().manual_seed(0)
    slopes, offsets = (torch.randn(shape, generator=drawn, dtype=torch.float64) for _ in range(2))
    slopes = 0.5 * slopes.tanh()
    return slopes, offsets, lambda latents, step: slopes[step] * latents + offsets[step]


def test_a_step_is_a_rotation_by_the_angle_between_its_noise_levels(pipe):
    loop = Loop(pipe, 10, 0, "ddim")
    for step in range(loop.steps):
        delta = angle(loop, step) - angle(loop, step + 1)
        assert coefficients(loop, step) == pytest.approx((np.cos(delta), np.sin(delta)), abs=1e-6)


def test_of_a_linear_model_the_inversion_is_exact(pipe):
    loop = Loop(pipe, 10, 0, "ddim")
    slopes, offsets, predict = linear(loop)
    video = torch.randn(1, 3, 4, 8, 8, dtype=torch.float64)
    found = invert(loop, predict, video, 1, iterations=200, tolerance=1e-14)
    solved = video[0]
    for step in reversed(range(1, 10)):
        keep, gain = coefficients(loop, step)
        solved = (solved + gain * offsets[step]) / (keep - gain * slopes[step])
        assert torch.allclose(found.at(step), solved, atol=1e-10, rtol=0)
    assert found.latents.shape == (10, 3, 4, 8, 8)
    assert torch.equal(found.at(10), video[0])
    assert torch.allclose(sampled(loop, predict, found), video, atol=1e-10, rtol=0)


def test_one_iteration_is_ddim_from_the_prediction_of_the_less_noisy_latents(pipe):
    """x0 and the noise are told from x_t' and v(x_t', t) as if they stood at the angle of t."""
    loop = Loop(pipe, 10, 0, "ddim")
    _, _, predict = linear(loop)
    video, forwards = torch.randn(1, 3, 4, 8, 8, dtype=torch.float64), []
    found = invert(loop, lambda x, step: forwards.append(step) or predict(x, step), video, 4, iterations=1)
    latents = video
    for step in reversed(range(4, 10)):
        v, theta, delta = predict(latents, step), angle(loop, step), angle(loop, step) - angle(loop, step + 1)
        noisy = (latents + np.sin(delta) * v) / np.cos(delta)
        clean, noise = np.cos(theta) * noisy - np.sin(theta) * v, np.sin(theta) * noisy + np.cos(theta) * v
        latents = np.cos(theta) * clean + np.sin(theta) * noise
        assert torch.allclose(found.at(step), latents[0], atol=1e-5)
    assert forwards == [9, 8, 7, 6, 5, 4]
    assert found.forwards == 6


def error(pipe, steps, iterations):
    """Of inverting the toy's video and sampling it again, root mean square."""
    loop = Loop(pipe, steps, 0, "ddim")
    predict, video = plain(loop, loop.encode([tiny.PROMPT])), encode(loop, FRAMES)
    found = invert(loop, predict, video, max(1, steps // 10), iterations)
    return (sampled(loop, predict, found) - video).square().mean().sqrt().item()


def test_a_round_trip_comes_nearer_with_more_steps_and_with_more_iterations(pipe):
    few, more, many = (error(pipe, steps, 1) for steps in (5, 10, 25))
    assert few > 1.5 * more
    assert more > 1.5 * many
    assert error(pipe, 10, 50) < 0.1 * many


def test_the_prediction_is_the_conditional_one_at_guidance_1(pipe):
    loop = Loop(pipe, 4, 0, "ddim")
    text, latents = loop.encode([tiny.PROMPT]), torch.randn(1, 3, 4, 8, 8)
    given = Lockstep(loop, text, loop.encode([""]), lambda _: 1.0)(latents, 2)
    assert torch.allclose(plain(loop, text)(latents, 2), given, atol=1e-5)


def test_pixels_become_the_mean_of_the_autoencoder_in_its_scale(pipe):
    loop = Loop(pipe, 4, 0, "ddim")
    video = torch.from_numpy(FRAMES).float().permute(3, 0, 1, 2)[None] / 127.5 - 1
    with torch.no_grad():
        mean = pipe.vae.encode(video).latent_dist.mean
    found = encode(loop, FRAMES)
    assert found.shape == (1, 3, 4, 8, 8)
    assert torch.equal(found, mean.permute(0, 2, 1, 3, 4) * 1.15)
    assert torch.equal(found, encode(loop, FRAMES))


@pytest.mark.parametrize("shape", [(8, 32, 32, 3), (9, 32, 64, 3), (9, 32, 32, 1), (13, 32, 32, 3)])
def test_a_video_of_another_size_is_refused(pipe, shape):
    with pytest.raises(LayoutError, match=r"must have the model's frames, rows and columns, \(9, 32, 32, 3\)\. Got"):
        encode(Loop(pipe, 4, 0, "ddim"), np.zeros(shape, np.uint8))


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_a_prompt_that_follows_is_at_the_video_before_every_step(pipe, guidance):
    loop = Loop(pipe, 5, 0, "ddim")
    text, negative = loop.encode([tiny.PROMPT, tiny.OTHER]), loop.encode(["", ""]) if guidance > 1 else None
    way = invert(loop, plain(loop, text[:1]), encode(loop, FRAMES), 1, 20)
    both, seen = Lockstep(loop, text, negative, lambda _: guidance), []

    def predict(latents, step):
        seen.append((step, latents.clone()))
        return both(latents, step)

    start = State(1, way.at(1).expand(2, -1, -1, -1, -1), None, loop.generator.get_state())
    done = denoise(loop, predict, start, edits=[Follow(way, 0)]).latents
    alone = denoise(loop, both, start).latents
    assert [step for step, _ in seen] == [1, 2, 3, 4]
    assert all(torch.equal(latents[0], way.at(step)) for step, latents in seen)
    assert torch.equal(done[0], way.at(5))
    assert torch.equal(done[1], alone[1])
    assert not torch.equal(done[1], done[0])
    drift = (alone[0] - done[0]).abs().max()
    assert drift < 2e-4 if guidance == 1 else drift > 2e-3


def test_a_trajectory_is_counted_in_steps_of_the_run():
    way = Trajectory(3, torch.arange(4.0).reshape(4, 1, 1, 1, 1))
    assert [way.at(step).item() for step in (3, 4, 5, 6)] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("sampler", "start", "iterations", "said"),
    [
        ("dpm", 1, 1, "must have the sampler ddim, which draws no noise. Got CogVideoXDPMScheduler"),
        ("ddim", 0, 1, "must end at a step of the 4 that holds something of the video. Got 0"),
        ("ddim", 4, 1, "Got 4. Take 1 or a later one"),
        ("ddim", -1, 1, "Got -1"),
        ("ddim", 1, 0, "in 1 iteration or more. Got 0"),
    ],
)
def test_what_cannot_be_inverted_is_refused(pipe, sampler, start, iterations, said):
    loop = Loop(pipe, 4, 0, sampler)
    with pytest.raises(UsageError, match=said):
        invert(loop, plain(loop, loop.encode([tiny.PROMPT])), torch.zeros(1, 3, 4, 8, 8), start, iterations)
