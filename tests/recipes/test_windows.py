"""A longer video in windows: the numbers of a recipe, and what it makes against the same program written by hand."""

from __future__ import annotations

import json

import pytest
import torch

from control.adapter import Loop
from control.denoise import Lockstep, State, denoise
from control.overlap import Windows
from probe.errors import RecipeError, UsageError
from probe.site import Branch
from recipes.catalogue import branches, interventions, layer_passes
from recipes.job import prepare
from recipes.language import parse
from recipes.predict import predicted
from recipes.run import execute, go_on
from tests import tiny

STEPS, FRAMES = 4, 6
PROMPTS = {"one": tiny.PROMPT, "two": tiny.OTHER}


def recipe(model, frames=FRAMES, more=None, **windows):
    data = {"schema_version": 1, "name": "long", "model": model, "prompts": PROMPTS}
    data |= {"sampler": {"steps": STEPS, "guidance": 3.0}, "windows": {"frames": frames, **windows}}
    return parse.validate(data | (more or {}), "long")


@pytest.fixture(autouse=True)
def without_mp4(monkeypatch):
    monkeypatch.setattr("probe.film.has_ffmpeg", lambda: False)


@pytest.mark.parametrize(
    ("given", "starts", "prompts"),
    [
        ({}, (0, 1, 2, 3), (0, 0, 1, 1)),
        ({"stride": 2}, (0, 2, 3), (0, 0, 1)),
        ({"stride": 3, "prompts": ["two", "one"]}, (0, 3), (1, 0)),
        ({"frames": 4, "prompts": ["two", "two"]}, (0, 1), (1, 1)),
    ],
)
def test_windows_are_numbers_for_the_model_at_hand(toy, given, starts, prompts):
    job = prepare(recipe(toy, **given))
    assert (job.cut.starts, job.cut.prompts, job.cut.length) == (starts, prompts, 3)
    assert job.frames == given.get("frames", FRAMES)
    assert job.cut.shown == tuple(Branch(prompt, window) for window, prompt in enumerate(prompts))
    assert [job.start_frame(branch) for branch in job.cut.shown] == list(starts)


def test_the_latents_are_those_of_the_same_program_by_hand(toy, tmp_path):
    pipe = tiny.pipeline()
    loop = Loop(pipe, STEPS, 0)
    text = loop.encode(list(PROMPTS.values()))[[0, 0, 1]]
    clips = Lockstep(loop, text, loop.encode([""]).expand_as(text), lambda t: 3.0)
    start = State.start(loop, 1, FRAMES, text.dtype)
    expected = denoise(loop, Windows(clips, (0, 2, 3), 3, "uniform"), start).latents
    record = {"record": {"words": ["cat", "dog"]}}
    run = execute(recipe(toy, stride=2, weights="uniform", more=record), tmp_path / "run", quiet=True)
    assert torch.equal(torch.from_numpy(run.resume()[1]["latents"]), expected)
    parts = [run.index.head(0).segments[place] for place in sorted(run.index.head(0).segments)]
    assert [part.words for part in parts] == [("cat",), ("cat",), ("dog",)]
    assert [part.attrs["start_frame"] for part in parts] == [0, 2, 3]


def test_a_window_must_show_a_prompt_there_is(toy):
    with pytest.raises(RecipeError, match=r"windows.prompts.1 must name a prompt. Got 'three'"):
        recipe(toy, more={"windows": {"frames": FRAMES, "prompts": ["one", "three"]}})


def test_guides_and_edits_act_in_every_window_of_their_prompt(toy):
    guide = {"weight": 1, "prompts": ["two"], "perturb": [{"op": "identity"}]}
    sharper = {"op": "temper", "factor": 2, "prompts": ["one"]}
    given = recipe(toy, stride=2, more={"guides": [guide], "edits": [sharper]})
    job = prepare(given)
    made = interventions(job)
    shown = [Branch(0, 0), Branch(0, 1), Branch(1, 2)]
    assert set(branches(job, made)) == {
        *shown,
        *(Branch(one.prompt, one.segment, guided=False) for one in shown),
        Branch(1, 2, "perturbed"),
    }
    assert layer_passes(job, made) == [7 * 3] * STEPS
    (temper,) = made.edits["edits.0 temper"].handlers
    assert temper.where.rows(shown) == (0, 1)


def test_a_dry_run_tells_of_windows(toy):
    facts = predicted(prepare(recipe(toy, stride=2)))
    assert (facts["windows"], facts["latent frames"], facts["video frames"]) == (3, FRAMES, 21)
    assert facts["windows begin at"] == [0, 2, 3]
    assert facts["layer passes of each step"] == "18 in 0 to 3"
    json.dumps(facts)


def test_a_stopped_run_goes_on(toy, tmp_path, monkeypatch):
    given, folder = recipe(toy, stride=2), tmp_path / "run"
    whole = execute(given, tmp_path / "whole", quiet=True).resume()[1]["latents"]
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr("recipes.run.finish_video", lambda *a: 1 / 0)
        execute(given, folder, quiet=True)
    assert (go_on(folder, quiet=True).resume()[1]["latents"] == whole).all()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"frames": 2}, "length <= frames. Got stride 1, length 3 and 2 frames"),
        ({"stride": 4}, "stride <= length"),
        ({"stride": 3, "prompts": ["one"]}, "windows.prompts must name one prompt for each of the 2 windows. Got 1"),
        ({"frames": 3}, "windows must be as many as the prompts, or more. Got 1 for 2 prompts"),
    ],
)
def test_windows_that_do_not_fit_are_refused(toy, given, said):
    with pytest.raises(UsageError, match=said.replace(".", r"\.")):
        prepare(recipe(toy, **given))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"segments": {}}, "windows must be without segments"),
        (
            {"edits": [{"op": "transfer", "source": "one", "prompts": ["two"]}]},
            "edits.0.source must not be another prompt in a recipe with windows. Got 'one'",
        ),
        (
            {"latents": [{"op": "blend", "source": "one", "masks": [{"box": [0, 0, 1, 1]}]}]},
            "latents.0.source must not be another prompt",
        ),
        ({"masks": {"cat": {"word": "cat", "prompt": "one"}}}, "masks.cat.prompt must be found in each segment itself"),
        ({"record": {"readouts": ["similarity"]}}, "record.readouts must have several prompts side by side"),
    ],
)
def test_what_needs_prompts_side_by_side_is_refused(toy, more, said):
    with pytest.raises(RecipeError, match=said.replace(".", r"\.")):
        recipe(toy, more=more)
