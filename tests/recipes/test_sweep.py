"""Sweeps: every run once, and a table of what came out."""

from __future__ import annotations

import csv
import json
import os

import numpy as np
import pytest

from probe.errors import UsageError
from recipes import suite, sweep
from recipes.sweep_store import Row, Table
from recipes.sweep_table import by_arm, by_difference, counted, summary
from tests.recipes.line import main_ok, refused
from tests.recipes.standin import Quick, plan_file, rows_of, tasks_of


@pytest.fixture
def quick(monkeypatch):
    """The command line with a stand-in for the model."""
    monkeypatch.setattr("recipes.sweep_run.Maker", Quick)


def test_a_sweep_is_every_arm_on_every_group_with_every_seed(tmp_path):
    tasks = tasks_of(tmp_path, "fine", "good")
    assert [task.key for task in tasks[:4]] == [("a", "fine", 0), ("b", "fine", 0), ("a", "fine", 1), ("b", "fine", 1)]
    assert len(tasks) == 8
    assert len(tasks[0].recipe.edits) == 1
    assert not tasks[1].recipe.edits
    assert {task.recipe.sampler.seed for task in tasks} == {0, 1}
    assert tasks[0].recipe.texts == ("a red ball", "a blue ball")
    assert tasks[5].folder == tmp_path / "out" / "runs" / "b" / "good" / "0"


def test_objects_and_durations_of_a_group_reach_the_recipe(tmp_path):
    group = suite.Group(
        id="x", kind="y", prompts=["a red ball", "a blue ball"], objects=["red ball", "ball"], durations=[1, 2]
    )
    arm = sweep.Arm(recipe="ditctrl", objects=["record.words"])
    plan = sweep.Sweep(schema_version=1, suite="miniature", arms={"a": arm})
    (task,) = sweep.tasks(plan, [group], tmp_path)
    assert task.recipe.record.words == ["red ball", "ball"]
    assert task.recipe.segments.durations == [1, 2]
    with pytest.raises(UsageError, match=r"which a takes as record.words. Got x without"):
        sweep.tasks(plan, [group.model_copy(update={"objects": None})], tmp_path)


@pytest.mark.parametrize(
    ("arms", "more", "said"),
    [
        ("{a: {recipe: ditctl}}", "", "a with fine: A recipe must be a YAML file or a built-in name. Got ditctl"),
        ("{a: {recipe: ditctrl, set: {steps: 7}}}", "", "The number of steps must divide 1000"),
        ("{a: {recipe: ditctrl, set: {stps: 7}}}", "", "a with fine: --set must name a key of the recipe. Got stps"),
        ("{a: {recipe: ditctrl}}", "reference: c", "line 5: reference must be one of the arms, a. Got c"),
        ("{a: {recipe: ditctrl}}", "seeds: [1, 1]", "line 5: seeds must differ from each other. Got [1, 1]"),
        ("{a: {recipe: ditctrl}, A: {recipe: record}}", "", "arms must differ in more than capitals. Got a, A"),
        ("{a: {recipe: ditctrl}}", "sed: [1]", "every key must be known. Got sed"),
        ("{}", "", "arms must be right: Dictionary should have at least 1 item"),
    ],
)
def test_a_bad_file_is_one_sentence_before_anything_is_made(tmp_path, capsys, quick, arms, more, said):
    file, out = plan_file(tmp_path, ["fine"], more, arms), tmp_path / "out"
    assert said in refused(capsys, ["sweep", file, "--out", str(out)], 2)
    assert not out.exists()


def test_a_finished_run_is_not_made_again_and_a_failed_one_is(tmp_path, capsys, quick):
    file, out = plan_file(tmp_path, ["fine", "failing"]), tmp_path / "out"
    line = ["sweep", file, "--out", str(out)]
    said = refused(capsys, line, 1)
    assert "Got 2 of 4 that failed, first a with failing, seed 0: It must work. Got no luck." in said
    assert [(row["arm"], row["status"], row["metrics"].get("made")) for row in rows_of(out)] == [
        ("a", "failed", None),
        ("a", "done", 1),
        ("b", "failed", None),
        ("b", "done", 2),
    ]
    (tmp_path / "suite.yaml").write_text(
        (tmp_path / "suite.yaml").read_text().replace("kind: failing", "kind: fine"), encoding="utf-8"
    )
    main_ok(line)
    made = {(row["arm"], row["group"]): row["metrics"]["made"] for row in rows_of(out)}
    assert made == {("a", "fine"): 1, ("b", "fine"): 2, ("a", "failing"): 1, ("b", "failing"): 2}
    assert {row["status"] for row in rows_of(out)} == {"done"}


def test_the_table_is_one_line_per_run_and_is_kept_when_less_is_asked(tmp_path, capsys, quick):
    file, out = plan_file(tmp_path, ["fine", "good", "failing"]), tmp_path / "out"
    refused(capsys, ["sweep", file, "--out", str(out)], 1)
    main_ok(["sweep", file, "--out", str(out), "--limit", "1", "--format", "json"])
    with (out / "results.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(one["arm"], one["group"]) for one in lines] == [
        (arm, group) for arm in "ab" for group in ("failing", "fine", "good")
    ]
    assert lines[0]["error"] == "It must work. Got no luck. Try again."
    assert float(lines[4]["score"]) == 10
    assert list(out.glob("*.tmp")) == []


def test_a_damaged_table_and_a_second_sweep_are_refused(tmp_path, capsys, quick):
    file, out = plan_file(tmp_path, ["fine"]), tmp_path / "out"
    main_ok(["sweep", file, "--out", str(out)])
    (out / "writer.lock").write_text(json.dumps({"pid": os.getppid(), "born": None}), encoding="utf-8")
    assert f"process {os.getppid()} is writing" in refused(capsys, ["sweep", file, "--out", str(out)], 1)
    (out / "writer.lock").unlink()
    (out / "results.json").write_text('{"rows": [', encoding="utf-8")
    assert "results.json of a sweep must be as it was written" in refused(capsys, ["sweep", file, "--out", str(out)], 1)
    assert (out / "results.json").read_text(encoding="utf-8") == '{"rows": ['


def test_an_interrupt_keeps_what_was_made(tmp_path, capsys, monkeypatch, quick):
    class Interrupted(Quick):
        def __call__(self, task):
            if self.made == 1:
                raise KeyboardInterrupt
            return super().__call__(task)

    file, out = plan_file(tmp_path, ["fine"]), tmp_path / "out"
    monkeypatch.setattr("recipes.sweep_run.Maker", Interrupted)
    said = refused(capsys, ["sweep", file, "--out", str(out)], 1)
    assert "Got an interrupt after 1 of 2 runs" in said
    assert len(rows_of(out)) == 1
    assert not (out / "writer.lock").exists()


def row(arm, group, seed, **metrics):
    return Row(arm, group, "kind", seed, "done", "", metrics=metrics)


def test_means_differences_and_intervals_are_over_groups():
    """Against a plain bootstrap of group means; a spread between groups does not hide a paired difference."""
    rng = np.random.default_rng(0)
    groups, seeds = [f"g{n}" for n in range(12)], (0, 1, 2)
    base = {(g, s): float(rng.normal(100 * n, 1)) for n, g in enumerate(groups) for s in seeds}
    rows = [row("a", *key, score=value) for key, value in base.items()]
    rows += [row("b", *key, score=value + 1 + 0.1 * rng.normal()) for key, value in base.items()]
    (found,) = summary(rows, "a")
    means = np.array([np.mean([base[g, s] for s in seeds]) for g in groups])
    resampled = np.sort(rng.choice(means, (4000, len(means))).mean(1))
    a = found["arms"]["a"]
    assert a["mean"] == pytest.approx(means.mean())
    assert a["low"] == pytest.approx(resampled[100], abs=40)
    assert a["high"] == pytest.approx(resampled[-100], abs=40)
    assert a["runs"] == 36
    b = found["differences"]["b"]
    assert 0.9 < b["low"] < b["mean"] < b["high"] < 1.1
    assert "a" not in found["differences"]


def test_pairs_are_those_that_both_arms_have():
    rows = [row("a", "g", 0, score=1.0), row("a", "h", 0, score=5.0), row("b", "h", 0, score=7.0)]
    rows += [row("b", "i", 0, score=100.0), row("c", "j", 0, score=3.0)]
    (found,) = summary(rows, "a")
    assert found["differences"] == {"b": {"mean": 2.0, "low": None, "high": None, "runs": 1}}
    (seeds,) = summary([row("a", "g", seed, score=float(seed)) for seed in range(5)], "a")
    assert seeds["arms"]["a"]["low"] < 2 < seeds["arms"]["a"]["high"]
    assert by_arm([found])[0]["c"] == "3.000"
    assert by_difference([seeds]) == []


def test_arms_are_counted():
    rows = [row("a", "g", 0), Row("a", "h", "kind", 0, "failed", ""), Row("b", "g", "kind", 0, "done", "", seconds=2.0)]
    assert counted(rows) == [
        {"arm": "a", "done": "1", "failed": "1", "seconds per run": ""},
        {"arm": "b", "done": "1", "failed": "0", "seconds per run": "2.0"},
    ]


def test_a_row_with_other_features_or_without_its_run_is_not_done(tmp_path):
    (task,) = tasks_of(tmp_path, "fine", more="seeds: [0]")[:1]
    table = Table(tmp_path / "out")
    table.add(Quick()(task))
    assert Table(tmp_path / "out").has(task)
    other = sweep.Task(*task.key[:2], task.kind, task.seed, task.recipe, task.out, "others")
    assert not Table(tmp_path / "out").has(other)
    task.folder.rmdir()
    assert not Table(tmp_path / "out").has(task)
