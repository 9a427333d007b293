"""Workers of a sweep: processes and Ray; one that dies loses one run."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from probe.errors import UsageError
from recipes import suite, sweep, sweep_ray, sweep_workers
from recipes.sweep_workers import carried_out
from tests.recipes.line import refused
from tests.recipes.standin import Quick, plan_file, tasks_of

ROOT = Path(__file__).parents[2]


def test_a_worker_that_dies_loses_one_run_and_one_that_died_once_none(tmp_path):
    tasks = tasks_of(tmp_path, "fine", "deadly", "deadly-once", "good", more="")[::2]
    with sweep_workers.local(2, Quick) as workers:
        rows = {row.group: row for row in carried_out(tasks, workers)}
    assert len(rows) == 4
    assert {group for group, row in rows.items() if row.status == "failed"} == {"deadly"}
    assert "Got two that died: its process ended with 3." in rows["deadly"].error
    assert os.getpid() not in {row.metrics["process"] for row in rows.values() if row.status == "done"}


def test_a_worker_ends_with_the_sweep_also_when_that_is_killed(tmp_path):
    """In the middle of a run; nothing waits for ever, or keeps a GPU."""
    code = """
import multiprocessing
import sys
from pathlib import Path
from recipes.sweep import Task
from recipes.sweep_workers import Process
from tests.recipes.standin import Quick

if __name__ == "__main__":
    task = Task("a", "slow", "slow", 0, None, Path(sys.argv[1]))
    Process(Quick).submit(task)
    print(multiprocessing.active_children()[0].pid, flush=True)
    sys.stdin.read()
"""
    file = tmp_path / "driver.py"
    file.write_text(code, encoding="utf-8")
    given = {**os.environ, "PYTHONPATH": str(ROOT)}
    line, begun = [sys.executable, str(file), str(tmp_path)], tmp_path / "runs" / "a" / "slow" / "0"
    with subprocess.Popen(line, stdin=-1, stdout=-1, text=True, env=given) as driver:
        worker, deadline = int(driver.stdout.readline()), time.monotonic() + 60
        while not begun.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert alive(worker)
        driver.kill()
    deadline = time.monotonic() + 20
    while alive(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(worker)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_ray_makes_the_runs_and_loses_one_that_kills_its_worker(tmp_path):
    pytest.importorskip("ray", reason='Ray is not installed: pip install ".[cluster]"')
    plan = sweep.load(plan_file(tmp_path, ["fine", "deadly"], "", "{a: {recipe: ditctrl}}"))
    tasks = sweep.tasks(plan, suite.chosen(plan.suite), tmp_path)
    with sweep_ray.cluster("local", 1, Quick) as workers:
        rows = {row.group: row for row in carried_out(tasks, workers)}
    assert {group: row.status for group, row in rows.items()} == {"fine": "done", "deadly": "failed"}
    assert "Got two that died: The actor died" in rows["deadly"].error


@pytest.mark.parametrize(
    ("there", "said"),
    [
        ({"CPU": 2.0}, "must have a CPU for every worker. Got 3 workers and 2"),
        ({"CPU": 8.0, "GPU": 1.0}, "GPU and a CPU"),
    ],
)
def test_a_cluster_that_is_too_small_is_refused_and_not_waited_for(monkeypatch, there, said):
    left = []
    fake = SimpleNamespace(init=dict, cluster_resources=lambda: there, shutdown=lambda: left.append(1))
    monkeypatch.setitem(sys.modules, "ray", fake)
    with pytest.raises(UsageError, match=said), sweep_ray.cluster("local", 3, Quick):
        pass
    assert left == [1]


def test_a_cluster_with_gpus_gets_a_worker_for_each(monkeypatch):
    asked, killed = [], []
    actor = SimpleNamespace(remote=lambda begin: begin)
    fake = SimpleNamespace(
        init=dict,
        cluster_resources=lambda: {"CPU": 8.0, "GPU": 2.0},
        remote=lambda **given: asked.append(given) or (lambda kind: actor),
        kill=killed.append,
        shutdown=dict,
    )
    monkeypatch.setitem(sys.modules, "ray", fake)
    with sweep_ray.cluster("auto", None, Quick) as workers:
        assert len(workers) == 2
    assert asked == [{"num_cpus": 1, "num_gpus": 1}] * 2
    assert len(killed) == 2


def test_no_cluster_is_one_sentence(tmp_path, capsys, monkeypatch):
    pytest.importorskip("ray", reason='Ray is not installed: pip install ".[cluster]"')
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    file = plan_file(tmp_path, ["fine"])
    line = ["sweep", file, "--out", str(tmp_path / "out"), "--cluster"]
    assert "A cluster must answer. Got ConnectionError from auto" in refused(capsys, [*line, "auto"], 2)
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "A cluster needs Ray. Got none installed." in refused(capsys, [*line, "local"], 2)


def test_workers_of_one_machine_share_its_gpus(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr(sweep_workers, "Process", lambda begin: SimpleNamespace(begin=begin, close=list))
    with sweep_workers.local(3, Quick) as workers:
        assert [worker.begin.args for worker in workers] == [("cuda:0",), ("cuda:1",), ("cuda:0",)]
    with sweep_workers.local(1, Quick) as (worker,):
        assert isinstance(worker, sweep_workers.Here)
