"""Edits must reach a pass of the run, guides act where they run, and what failed for good is not called done."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from probe.errors import PlanError
from probe.store import Run
from recipes import run
from recipes.catalogue import branches, interventions
from recipes.job import prepare
from recipes.language import parse
from recipes.predict import predicted
from tests import tiny
from tests.recipes.line import main_ok, refused

STEPS = 4
SKIP = {"op": "skip", "layers": 2}
OFF = {"op": "scale", "tensor": "o", "factor": 0}
UNGUIDED = {"sampler": {"steps": STEPS, "guidance": 1}}
HALF = {"edits": [OFF | {"guidance": "unconditional"}]}


def recipe(model, **more):
    data = {"schema_version": 1, "name": "reach", "model": model, "sampler": {"steps": STEPS, "guidance": 3.0}}
    return parse.validate({**data, "prompts": {"source": tiny.PROMPT, "target": tiny.OTHER}, **more}, "reach")


def guide(weight: Any = 1, perturb: Any = SKIP, **more: Any) -> dict[str, Any]:
    return {"weight": weight, "perturb": [perturb], **more}


def made_of(model, **more):
    return interventions(prepare(recipe(model, **more)))


def latents_of(folder, model, **more):
    return run.execute(recipe(model, **more), folder, quiet=True).resume()[1]["latents"]


def written(folder, model, **more):
    (folder / "reach.yaml").write_text(parse.dump(recipe(model, **more)))
    return str(folder / "reach.yaml")


def stopping_after(step, monkeypatch):
    """Runs are interrupted once `step` steps are finished."""
    real = run._on_step

    def stopping(*given):
        write = real(*given)

        def on_step(state):
            write(state)
            if state.step == step:
                raise KeyboardInterrupt

        return on_step

    monkeypatch.setattr(run, "_on_step", stopping)


@pytest.fixture(autouse=True)
def without_mp4(monkeypatch):
    monkeypatch.setattr("probe.film.has_ffmpeg", lambda: False)


@pytest.mark.parametrize(
    ("place", "more"),
    [
        ("edits.0 scale", HALF | UNGUIDED),
        ("guides.0.perturb.0 skip", {"guides": [guide(steps=[0, 2], perturb=SKIP | {"steps": [2, 4]})]}),
        ("guides.0.perturb.0 skip", {"guides": [guide(prompts=["source"], perturb=SKIP | {"prompts": ["target"]})]}),
        ("guides.0.perturb.0 scale", {"guides": [guide(perturb=OFF | {"guidance": "unconditional"})]}),
        ("guides.1.perturb.0 skip", {"guides": [guide(steps=[0, 1], perturb=OFF), guide(0, SKIP | {"steps": 1})]}),
    ],
)
def test_an_edit_that_no_pass_can_meet_is_refused_before_a_model_is_loaded(
    toy, tmp_path, capsys, monkeypatch, place, more
):
    monkeypatch.setattr(run, "load", lambda *a, **k: 1 / 0)
    file = written(tmp_path, toy, **more)
    for how in (["--dry-run"], ["--out", str(tmp_path / "run")]):
        assert f"{place}: An edit must be for a pass that the run makes" in refused(capsys, ["run", file, *how], 2)
    assert not (tmp_path / "run").exists()


def test_the_unconditional_half_is_there_with_guidance_and_with_segments(toy):
    for more in ({}, {"segments": {}} | UNGUIDED):
        assert made_of(toy, **HALF, **more).handlers
    job = prepare(recipe(toy, **UNGUIDED))
    assert all(branch.guided for branch in branches(job, interventions(job)))
    with pytest.raises(PlanError, match=r"edits\.0 scale: An edit must be for a pass"):
        made_of(toy, **HALF, **UNGUIDED)


@pytest.mark.parametrize(
    ("guides", "steps"),
    [
        ([guide()], [None]),
        ([guide(steps=[0, 2])], [(0, 1)]),
        ([guide(steps=[0, 3], perturb=SKIP | {"steps": [1, 4]})], [(1, 2)]),
        ([guide({"from": 0, "to": 1, "shape": "step", "start": 0.4, "stop": 0.5})], [(2, 3)]),
        ([guide(steps=[0, 1]), guide(steps=[3, 4], perturb=OFF)], [(0, 3), (0, 3)]),
        ([guide(steps=[0, 1]), guide(steps=[3, 4], perturb=OFF, name="b")], [(0,), (3,)]),
        ([guide(steps=[0, 1], prompts=["source"]), guide(prompts=["target"], perturb=OFF)], [(0,), None]),
        ([guide(), guide(-1, steps=[2, 4], perturb=OFF)], [(0, 1), (0, 1)]),
    ],
)
def test_a_perturbation_is_for_the_steps_that_have_its_pass(toy, guides, steps):
    assert [handler.where.steps for handler in made_of(toy, guides=guides).handlers] == steps


def test_a_stage_that_comes_after_the_guide_is_left_out(toy):
    subject = {"text": {"word": "cat"}, "region": {"box": [0, 0, 4, 2]}}
    lamic = {"op": "lamic", "subjects": [subject], "switch": 0.5, "prompts": ["source"]}
    (first,) = made_of(toy, guides=[guide(steps=[0, 1], perturb=lamic)]).handlers
    assert (str(first), first.where.steps) == (str(made_of(toy, edits=[lamic]).handlers[0]), (0,))


@pytest.mark.parametrize(
    "given",
    [
        guide(0),
        guide({"from": 0, "to": 1, "shape": "step", "start": 0.4, "stop": 0.5}, steps=[0, 2]),
        guide(0, {"op": "transfer", "source": {"stored": {"step": 1}}, "rows": "obj", "prompts": ["target"]}),
    ],
)
def test_a_guide_of_weight_0_is_as_if_it_were_not_there(toy, tmp_path, given):
    more = {"masks": {"obj": {"word": "cat", "prompt": "source"}}}
    job = prepare(recipe(toy, guides=[given], **more))
    assert not interventions(job).handlers
    told = predicted(job)
    assert told[f"guides.0.perturb.0 {given['perturb'][0]['op']}"] == "nothing: its guide has weight 0"
    made = latents_of(tmp_path / "zero", toy, guides=[given], **more)
    np.testing.assert_array_equal(made, latents_of(tmp_path / "none", toy))


def test_a_run_goes_on_past_the_steps_of_its_guide(toy, tmp_path, monkeypatch, capsys):
    guides, folder = [guide(steps=[0, 2])], tmp_path / "run"
    whole = latents_of(tmp_path / "whole", toy, guides=guides)
    assert not np.array_equal(whole, latents_of(tmp_path / "plain", toy))
    with monkeypatch.context() as patch:
        stopping_after(3, patch)
        refused(capsys, ["run", written(tmp_path, toy, guides=guides), "--out", str(folder)], 1)
    main_ok(["resume", str(folder)])
    assert Run(folder).status == "done"
    np.testing.assert_array_equal(Run(folder).resume()[1]["latents"], whole)


def test_a_run_that_was_refused_after_its_last_step_is_not_resumed(toy, tmp_path, monkeypatch, capsys):
    folder, file = tmp_path / "run", written(tmp_path, toy, **HALF, **UNGUIDED)
    monkeypatch.setattr("recipes.catalogue.check", lambda *_: None)
    assert "must meet at least one attention call" in refused(capsys, ["run", file, "--out", str(folder)], 2)
    assert len(Run(folder).steps) == STEPS
    line = refused(capsys, ["resume", str(folder)], 1)
    assert "A run to resume must not have been refused. Got" in line
    assert "Scale(o by 0.0), which met none in this run" in line
    assert Run(folder).status == "failed"


@pytest.mark.parametrize("factor", [1e300, 1e38])
def test_latents_that_are_not_finite_end_the_run(toy, tmp_path, capsys, factor):
    edits = [OFF | {"factor": factor, "steps": [2, 4]}]
    folder, file = tmp_path / "run", written(tmp_path, toy, edits=edits)
    line = refused(capsys, ["run", file, "--out", str(folder)], 1)
    assert "Latents must be finite numbers after every step. Got NaN or infinity after step 2 of 4" in line
    stopped = Run(folder)
    assert (stopped.status, stopped.steps) == ("failed", (0, 1))
    assert np.isfinite(stopped.resume()[1]["latents"]).all()
    assert "after step 2 of 4" in refused(capsys, ["resume", str(folder)], 1)
    assert Run(folder).steps == (0, 1)
