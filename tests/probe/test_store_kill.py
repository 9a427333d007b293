"""A writer killed in the middle of writing a file loses that file only: everything before is whole and exact.

30 kills by default; MMDIT_KILLS=100 sets another number.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from probe.store import Run, RunWriter
from tests.probe.samples import child, heavy, lift, state

KILLS = int(os.environ.get("MMDIT_KILLS", "30"))

WRITER = """
    import sys, time
    from probe import folder
    from probe.store import RunWriter
    from tests.probe.samples import heavy, state

    def announced(path, data, real=folder.replace_file):
        print("begin", path.name, flush=True)
        began = time.perf_counter()
        real(path, data)
        print("whole", path.name, time.perf_counter() - began, flush=True)

    with RunWriter.create(sys.argv[1], {}, "") as writer:
        folder.replace_file = announced
        for step in range(1000):
            writer.write_step(step, {}, [heavy(step % 4)], state(step))
"""


class Said(NamedTuple):
    """What a writer told before it was killed: the files it had begun, and those that were in place."""

    begun: list[str]
    whole: list[str]


def kill_while_it_writes(folder: Path, rng: np.random.Generator) -> Said:
    """SIGKILL a writer at a random moment of its writing of a random file; the moment counts from its own word."""
    said, lasts = Said([], []), {}
    after = int(rng.integers(4, 11))
    with child(WRITER, folder) as writer:
        for line in writer.out:
            word, name, *seconds = line.split()
            if word == "whole":
                said.whole.append(name)
                lasts[name == "resume.h5"] = float(*seconds)
                continue
            said.begun.append(name)
            if len(said.whole) >= after:
                time.sleep(rng.uniform(0, lasts[name == "resume.h5"]))
                writer.process.send_signal(signal.SIGKILL)
                break
        for line in writer.out:
            if not line.endswith("\n"):
                break  # killed in the middle of a word
            word, name, *_ = line.split()
            (said.whole if word == "whole" else said.begun).append(name)
        assert writer.process.wait() == -signal.SIGKILL
    return said


def check_what_is_left(run: Run, said: Said) -> None:
    """Every step before the kill is exact; the state follows the newest, or the one before it."""
    steps = sum(name.startswith("step") for name in said.whole)
    states = said.whole.count("resume.h5")
    assert (run.status, run.broken) == ("interrupted", ())
    assert run.steps in (tuple(range(steps)), tuple(range(steps + 1)))
    for step in run.steps:
        (query, key), kept = heavy(step % 4).qk[4], run.qk(4, step)
        np.testing.assert_array_equal(kept, (query, key))
        np.testing.assert_allclose(run.word_map("red", step=step, layer=4, head=1), lift(step % 4)[1, 1, 0], rtol=0.03)
    last, found = run.resume()
    assert last in (states - 1, states)
    assert run.steps[-1] - 1 <= last <= run.steps[-1]
    assert found["step"] == last
    np.testing.assert_array_equal(found["latents"], state(last)["latents"])


def go_on(run: Run) -> None:
    """The next step replaces what the kill left half-written."""
    step = run.resume()[0] + 1
    with RunWriter.reopen(run.path) as writer:
        writer.write_step(step, {}, [heavy(step % 4)], state(step))
    assert (run.status, run.steps, run.resume()[0]) == ("done", tuple(range(step + 1)), step)
    np.testing.assert_array_equal(run.qk(4, step), heavy(step % 4).qk[4])
    assert drafts(run.path) == []


def drafts(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*.tmp"))


def test_a_writer_killed_while_it_writes_loses_that_file_only(tmp_path):
    half_written = []
    for number in range(KILLS):
        rng = np.random.default_rng(number)
        said = kill_while_it_writes(tmp_path / str(number), rng)
        run = Run(tmp_path / str(number))
        check_what_is_left(run, said)
        assert set(drafts(run.path)) <= {f"{said.begun[-1]}.tmp"}
        half_written += drafts(run.path)
        go_on(run)
    assert half_written, "no kill fell into the writing of a file: the moments are drawn wrongly"
    print(f"{KILLS} kills left {len(half_written)} half-written files: {', '.join(sorted(set(half_written)))}")
