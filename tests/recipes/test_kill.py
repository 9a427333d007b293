"""Whole runs, killed at random moments: what was finished is readable, and `mmdit resume` gives the same bits."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import pytest

from probe.store import Run
from tests import tiny
from tests.recipes.line import TWO, main_ok

RUNS = ("ditctrl", "ditctrl", "record")
STEPS = 10
ROOT = Path(__file__).parents[2]


def command(name: str, toy: str, folder: Path) -> list[str]:
    """A two-prompt story with SDE-DPM-Solver++, which remembers an x0, or a plain DDIM run."""
    prompts = TWO if name == "ditctrl" else ["-p", tiny.PROMPT]
    return ["run", name, *prompts, "-m", toy, "--set", f"steps={STEPS}", "--set", "guidance=3", "--out", str(folder)]


def kill(number: int, toy: str, folder: Path) -> int:
    """Start a run in a process of its own and SIGKILL it a random moment after a random step; its exit code."""
    rng = np.random.default_rng(number)
    step, moment = int(rng.integers(0, STEPS - 3)), rng.uniform(0, 0.05)
    line = [sys.executable, "-m", "recipes.cli", *command(RUNS[number], toy, folder)]
    with subprocess.Popen(line, cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not (folder / "steps" / f"step_{step:04d}.h5").exists() and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(moment)
        process.send_signal(signal.SIGKILL)
        return process.wait()


@pytest.fixture(scope="module")
def killed(toy, tmp_path_factory):
    """Runs that were killed."""
    folders = [tmp_path_factory.mktemp("killed") / "run" for _ in RUNS]
    with ThreadPoolExecutor() as pool:  # most of their time they import
        codes = list(pool.map(kill, range(len(RUNS)), [toy] * len(RUNS), folders))
    assert codes == [-signal.SIGKILL] * len(RUNS)
    return [Run(folder) for folder in folders]


@pytest.fixture(scope="module")
def undisturbed(toy, tmp_path_factory):
    """The same runs, not killed."""
    folders = {name: tmp_path_factory.mktemp("whole") / "run" for name in RUNS}
    for name, folder in folders.items():
        main_ok(command(name, toy, folder))
    return {name: Run(folder) for name, folder in folders.items()}


def arrays(path: Path) -> dict[str, tuple]:
    """Every array of an HDF5 file, by its name: its type, shape and bits."""
    found = {}

    def take(name: str, item: h5py.Group | h5py.Dataset) -> None:
        if isinstance(item, h5py.Dataset):
            values = np.asarray(item[()])
            found[name] = values.dtype, values.shape, values.tolist() if item.dtype == object else values.tobytes()

    with h5py.File(path, "r") as file:
        file.visititems(take)
    return found


def differing(run: Run, whole: Run) -> list[int]:
    """Steps of `run` with an array that is not the same, bit for bit."""
    files = [[one.path / "steps" / f"step_{step:04d}.h5" for one in (run, whole)] for step in run.steps]
    return [step for step, (one, other) in zip(run.steps, files, strict=True) if arrays(one) != arrays(other)]


@pytest.mark.parametrize("number", range(len(RUNS)))
def test_a_killed_run_goes_on_to_the_same_bits(killed, undisturbed, number):
    run, whole = killed[number], undisturbed[RUNS[number]]
    before = run.steps
    assert (run.status, run.broken, run.video) == ("interrupted", (), None)
    assert before == tuple(range(len(before)))
    assert 0 < len(before) < STEPS
    assert not run.has_state or run.resume()[0] in before[-2:]
    assert differing(run, whole) == []
    main_ok(["resume", str(run.path)])
    assert (run.status, run.steps) == ("done", tuple(range(STEPS)))
    assert differing(run, whole) == []
    assert arrays(run.path / "resume.h5") == arrays(whole.path / "resume.h5")
    assert (run.path / "video.gif").read_bytes() == (whole.path / "video.gif").read_bytes()
    assert list(run.path.rglob("*.tmp")) == []
