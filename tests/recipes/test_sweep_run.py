"""Sweeps with a real model: one that is loaded once, and what goes wrong on the way."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from probe.store import Run
from recipes import sweep_run
from tests.recipes.line import main_ok, refused
from tests.recipes.standin import Colors, plan_file, rows_of

ROOT = Path(__file__).parents[2]


def test_two_runs_on_the_miniature(tmp_path, capsys, monkeypatch):
    """One loaded model makes both, as a run of its own would; a changed recipe is refused and nothing is touched."""
    out, file, loaded = tmp_path / "out", tmp_path / "mine.yaml", []
    load = sweep_run.load
    monkeypatch.setattr(sweep_run, "load", lambda model, **given: loaded.append(model) or load(model, **given))
    monkeypatch.setattr(sweep_run.features, "load", lambda name, device: loaded.append(name) or Colors())
    file.write_text(
        "schema_version: 1\nsuite: {name: miniature, kinds: [color], limit: 1}\nfeatures: colors\n"
        "arms: {a: {recipe: ditctrl, set: {edits: []}}, b: {recipe: ditctrl}}\n"
        "set: {sampler.steps: 2, record: null, segments.transitions: 1}\n",
        encoding="utf-8",
    )
    main_ok(["sweep", str(file), "--out", str(out), "--format", "json"])
    said = json.loads(capsys.readouterr().out)
    assert loaded == ["miniature", "colors"]
    metrics = said["rows"][1]["metrics"]
    assert 0 < metrics["cscv"] <= 1
    (difference,) = [one["differences"]["b"]["mean"] for one in said["summary"] if one["metric"] == "cscv"]
    assert difference == pytest.approx(metrics["cscv"] - said["rows"][0]["metrics"]["cscv"])
    assert [(one["arm"], one["status"], one["run"]) for one in said["rows"]] == [
        ("a", "done", "runs/a/color-1/0"),
        ("b", "done", "runs/b/color-1/0"),
    ]
    run = Run(out / "runs" / "b" / "color-1" / "0")
    assert metrics["frames"] == 4 * (run.resume()[1]["latents"].shape[1] - 1) + 1
    assert run.info["prompts"] == ["a red circle moving right", "a blue circle moving right"]
    main_ok(["run", str(run.path / "recipe.yaml"), "--out", str(tmp_path / "alone")])
    assert np.array_equal(run.resume()[1]["latents"], Run(tmp_path / "alone").resume()[1]["latents"])
    other = Run(out / "runs" / "a" / "color-1" / "0").resume()[1]["latents"]
    assert not np.array_equal(run.resume()[1]["latents"], other)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    file.write_text(file.read_text().replace("steps: 2", "steps: 4"), encoding="utf-8")
    line = refused(capsys, ["sweep", str(file), "--out", str(out)], 2)
    assert "Got another a for color-1 than that of" in line
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == before


def test_a_killed_sweep_goes_on(toy, tmp_path):
    """Killed in its second run: the first one is not made again, the second one goes on."""
    out, file = tmp_path / "out", tmp_path / "mine.yaml"
    there = tmp_path / "suite.yaml"
    there.write_text(
        "schema_version: 1\nname: toy\ngroups:\n"
        "  - {id: one, kind: x, prompts: [a red cat runs left, a blue dog sits on snow]}\n",
        encoding="utf-8",
    )
    file.write_text(
        f"schema_version: 1\nsuite: {there}\nmodel: {toy}\nfeatures: null\nseeds: [0, 1]\n"
        "arms: {a: {recipe: ditctrl}}\nset: {sampler.steps: 10, sampler.guidance: 3}\n",
        encoding="utf-8",
    )
    line = ["sweep", str(file), "--out", str(out)]
    first, second = (out / "runs" / "a" / "one" / str(seed) for seed in (0, 1))
    with subprocess.Popen([sys.executable, "-m", "recipes.cli", *line], cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not (second / "steps" / "step_0001.h5").exists() and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    assert [(one["seed"], one["status"]) for one in rows_of(out)] == [(0, "done")]
    assert Run(second).status == "interrupted"
    started = [Run(folder).info["started"] for folder in (first, second)]
    made = (first / "video.gif").stat().st_mtime_ns
    main_ok(line)
    assert [(one["seed"], one["status"]) for one in rows_of(out)] == [(0, "done"), (1, "done")]
    assert [Run(folder).info["started"] for folder in (first, second)] == started
    (out / "results.json").unlink()  # then a run that is finished is only measured again
    main_ok(line)
    assert len(rows_of(out)) == 2
    assert (first / "video.gif").stat().st_mtime_ns == made


@pytest.fixture
def short(toy, tmp_path):
    """One run of two steps on a toy."""
    given = f"model: {toy}\nset: {{sampler.steps: 2, sampler.guidance: 3, record: null, segments.transitions: 1}}"
    return ["sweep", plan_file(tmp_path, ["fine"], given, "{a: {recipe: ditctrl}}"), "--out", str(tmp_path / "out")]


def test_an_arm_that_never_can_work_is_refused_before_anything_is_made(tmp_path, capsys):
    """Steps must divide 1000."""
    file = plan_file(tmp_path, ["fine"], "", "{a: {recipe: ditctrl}, b: {recipe: ditctrl, set: {steps: 7}}}")
    assert "Got 7" in refused(capsys, ["sweep", file, "--out", str(tmp_path / "out")], 2)
    assert not (tmp_path / "out").exists()


def test_a_run_that_fails_is_a_row_and_one_that_is_interrupted_none(short, tmp_path, capsys, monkeypatch):
    def interrupt(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr("recipes.run.finish_video", interrupt)
    assert "Got an interrupt after 0 of 1 runs" in refused(capsys, short, 1)
    assert not (tmp_path / "out" / "results.json").exists()
    monkeypatch.setattr("recipes.run.finish_video", lambda *given: 1 / 0)
    said = refused(capsys, short, 1)
    assert "Got 1 of 1 that failed, first a with fine, seed 0: Something unexpected went wrong." in said
    (one,) = rows_of(tmp_path / "out")
    assert (one["status"], one["metrics"]) == ("failed", {})
    assert "ZeroDivisionError" in one["error"]


def test_numbers_are_those_that_can_be_averaged():
    given = {"a": 1, "b": np.float32(0.5), "c": True, "d": None, "e": "x", "f": float("nan"), "g": [1.0]}
    assert sweep_run.numbers(given) == {"a": 1.0, "b": 0.5, "c": 1.0}
