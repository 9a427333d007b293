"""Stand-ins for sweeps: plans in a folder, a maker of runs that makes nothing, and features without a model. Workers
must be able to import them.
"""

from __future__ import annotations

import json
import os
import time

import numpy as np

from recipes import suite, sweep
from recipes.sweep import Task
from recipes.sweep_store import Row

KINDS = {"deadly": "deadly", "deadly-once": "deadly once", "failing": "failing", "fine": "fine", "good": "fine"}
ARMS = "{a: {recipe: ditctrl}, b: {recipe: ditctrl, set: {edits: []}}}"


def plan_file(tmp_path, groups, more="", arms=ARMS):
    """A suite of the groups, whose kinds say what `Quick` does, and a sweep over it."""
    entries = [f"  - {{id: {one}, kind: {KINDS[one]}, prompts: [a red ball, a blue ball]}}" for one in groups]
    there = tmp_path / "suite.yaml"
    there.write_text("\n".join(["schema_version: 1", "name: x", "groups:", *entries]), encoding="utf-8")
    file = tmp_path / "mine.yaml"
    file.write_text(f"schema_version: 1\nsuite: {there}\narms: {arms}\nfeatures: null\n{more}", encoding="utf-8")
    return str(file)


def tasks_of(tmp_path, *groups, more="seeds: [0, 1]"):
    plan = sweep.load(plan_file(tmp_path, groups, more))
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    return sweep.tasks(plan, suite.chosen(plan.suite), out)


def rows_of(out):
    return json.loads((out / "results.json").read_text(encoding="utf-8"))["rows"]


class Quick:
    """A score of the arm and the seed; groups of some kinds fail, or kill their worker."""

    def __init__(self, device: str | None = None) -> None:
        self.made = 0

    def __call__(self, task: Task) -> Row:
        self.made += 1
        task.folder.mkdir(parents=True, exist_ok=True)
        if task.kind == "failing":
            return Row.failed(task, "It must work. Got no luck. Try again.")
        if task.kind == "slow":
            time.sleep(600)
        if task.kind == "deadly" or (task.kind == "deadly once" and _first(task)):
            os._exit(3)
        score = float(task.seed) + (10 if task.arm == "b" else 0)
        return Row.done(task, 0.5, {"score": score, "process": float(os.getpid()), "made": float(self.made)})


def _first(task: Task) -> bool:
    mark = task.out / f"{task.arm}-{task.group}-{task.seed}"
    there = mark.exists()
    mark.touch()
    return not there


class Colors:
    """The mean color of a frame, and whether a prompt says red, green or blue."""

    def images(self, frames):
        colors = frames.mean((1, 2)) + 1
        return colors, colors

    def texts(self, prompts):
        return np.array([[color in prompt for color in ("red", "green", "blue")] for prompt in prompts], float)
