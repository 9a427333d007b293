"""The main job on the miniature: the story turns, smoothly."""

import imageio.v3 as iio
import numpy as np
import pytest
import torch

import probe
from control.adapter import Loop
from control.denoise import Lockstep, State, denoise
from ditctrl.segment import Segments
from probe.store import Run
from recipes import scene
from recipes.cli import main
from recipes.job import prepare
from recipes.language import parse


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """What `mmdit run ditctrl` makes with no further argument."""
    folder = tmp_path_factory.mktemp("runs") / "story"
    with pytest.raises(SystemExit) as stopped:
        main(["run", "ditctrl", "--out", str(folder)])
    assert not stopped.value.code
    return Run(folder)


def frames_of(run):
    """Pixel frames of the mp4 at the model's own size."""
    return np.asarray(iio.imread(run.video))[:, 2::4, 2::4]


def cut_between_isolated_clips(prompts, seed):
    """Mean absolute pixel step from the end of the first prompt's own clip to the start of the last one's.

    Each clip starts from the noise of its own segment, as the authors' isolated baseline does.
    """
    job = prepare(parse.load("ditctrl", [f"seed={seed}"], {"prompts": list(prompts)}))
    assert isinstance(job.segments, Segments)
    loop = Loop(probe.load("miniature"), job.steps, seed, "dpm")
    start = State.start(loop, 1, job.frames, torch.float32)
    text = loop.encode(prompts)
    clips = []
    for prompt, segment in ((0, 0), (len(prompts) - 1, job.segments.count - 1)):
        own = State(0, start.latents[:, job.segments.window(segment)], None, start.generator)
        guided = Lockstep(loop, text[prompt : prompt + 1], torch.zeros_like(text[:1]), job.scale)
        clips.append(loop.decode(denoise(loop, guided, own).latents)[0])
    return step_sizes(np.stack([clips[0][-1], clips[1][0]]))[0]


def step_sizes(frames):
    """Mean absolute difference of neighbouring frames, in grey levels."""
    return np.abs(np.diff(frames.astype(float), axis=0)).mean((1, 2, 3))


def test_the_story_turns(story):
    frames = frames_of(story)
    quarter = len(frames) // 4
    for part, prompt in ((frames[:quarter], story.info["prompts"][0]), (frames[-quarter:], story.info["prompts"][-1])):
        ((color, shape, direction),), background = scene.parse(prompt)
        seen = scene.classify(part)
        assert seen is not None
        assert (seen.color, seen.shape, seen.direction, seen.background) == (color, shape, direction, background)


def test_it_turns_smoothly(story):
    largest = step_sizes(frames_of(story)).max()
    cut = cut_between_isolated_clips(story.info["prompts"], story.info["seed"])
    print(f"largest step {largest:.2f}, cut between isolated clips {cut:.2f} grey levels, ratio {largest / cut:.2f}")
    assert largest <= cut / 2


def test_what_was_recorded(story):
    assert story.status == "done"
    assert len(story.steps) == 25
    assert story.info["layer_passes"] / (25 * 12 * 6) == pytest.approx(1244 / 1800)  # of the pair loop
    for word in ("circle", "moving"):
        lift = story.word_map(word)
        assert lift.shape == (5, 8, 8)
        assert lift.max() > 1.2 * lift.mean()
