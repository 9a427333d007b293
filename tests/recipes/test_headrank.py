"""Heads of a run by several metrics at once, with a control group."""

from __future__ import annotations

import json

import numpy as np
import pytest

from control.search import head_candidates
from probe.store import Run
from recipes import headrank
from recipes.cli import main
from tests import tiny
from tests.recipes.line import FAST, main_ok


@pytest.fixture(scope="module")
def run(toy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("heads") / "run"
    looks = ["--set", "record.readouts=[entropy, frames]", "--set", "record.layers=[1, 3]"]
    main_ok(["record", tiny.PROMPT, "-m", toy, *FAST, *looks, "--out", str(folder)])
    return Run(folder)


def test_heads_are_ranked_by_the_mean_over_steps_and_told_by_their_own_layer(run):
    weights = (
        {"entropy_video": -1.0, "temporal_mass": 0.5} if "temporal_mass" in run.metrics else {"entropy_video": -1.0}
    )
    found = headrank.ranked(run, weights, 2)
    grids = {name: np.mean([run.metric_grid(name, s) for s in run.steps], 0, float) for name in weights}
    expected = head_candidates(grids, 2, weights)
    assert found["candidates"] == [[1 + layer, head] for layer, head in expected.heads]
    assert found["control"] == [[1 + layer, head] for layer, head in expected.control]
    first = found["heads"][0]
    assert first["entropy_video"] == pytest.approx(
        run.metric("entropy_video", layer=first["layer"], head=first["head"])
    )


def test_one_step_and_drawn_controls(run):
    weights = {"entropy_video": 1.0}
    at = run.steps[-1]
    best = np.unravel_index(run.metric_grid("entropy_video", at).argmax(), (2, 2))
    assert headrank.ranked(run, weights, 1, step=at)["candidates"] == [[1 + int(best[0]), int(best[1])]]
    drawn = {str(headrank.ranked(run, weights, 1, "random", seed)["control"]) for seed in range(12)}
    assert len(drawn) > 1


def test_weights_are_read_from_texts(run):
    assert headrank.weights_of(run, ["entropy_video=-2", "entropy_text"]) == {"entropy_video": -2, "entropy_text": 1}


def test_the_command_prints_places_for_recipes(run, capsys):
    capsys.readouterr()
    main_ok(["heads", str(run.path), "--metric", "entropy_video=-1", "--count", "2"])
    out = capsys.readouterr().out
    assert "candidates: places: [[" in out
    assert "control: places: [[" in out
    main_ok(["heads", str(run.path), "--metric", "entropy_text", "--count", "1", "--format", "json"])
    assert len(json.loads(capsys.readouterr().out)["candidates"]) == 1


def test_without_a_metric_the_command_says_what_there_is(run, capsys):
    capsys.readouterr()
    main_ok(["heads", str(run.path), "--format", "json"])
    assert json.loads(capsys.readouterr().out) == run.metric_info
    assert "entropy_video" in run.metric_info


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--metric", "beauty"], "must have been recorded. Got beauty"),
        (["--metric", "entropy_video=much"], "name=weight"),
        (["--metric", "entropy_video", "--count", "3"], "Got 3 of each"),
        (["--metric", "entropy_video", "--step", "99"], "99"),
    ],
)
def test_what_cannot_be_ranked_is_refused(run, capsys, given, said):
    with pytest.raises(SystemExit):
        main(["heads", str(run.path), *given])
    assert said in capsys.readouterr().err
