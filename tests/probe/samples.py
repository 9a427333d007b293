"""Small made-up records and runs for the tests of the run folder, and processes that write them."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from probe.store import Run, RunWriter, SegmentRecord

GRID = (2, 3, 4)
LAYERS = (1, 4)
HEADS = 3
WORDS = ("red", "circle")
ROOT = Path(__file__).parents[2]


class Child(NamedTuple):
    process: subprocess.Popen[str]
    out: IO[str]


def lift(seed: int, words: int = len(WORDS), heads: int = HEADS) -> np.ndarray:
    """Maps [L, H, W, F, Y, X] between the floor and 2**7 of uniform, with some zeros."""
    rng = np.random.default_rng(seed)
    maps = 2.0 ** rng.uniform(-7, 7, (len(LAYERS), heads, words, *GRID))
    maps[rng.random(maps.shape) < 0.1] = 0
    return maps.astype(np.float32)


def record(
    seed: int = 0, segment: int = 0, role: str = "plain", words: tuple[str, ...] = WORDS, **changes
) -> SegmentRecord:
    """A record with everything in it; `changes` replace its fields."""
    rng = np.random.default_rng(seed)
    mass = rng.random((len(LAYERS), HEADS, 3, 4)).astype(np.float32)
    fields = {
        "segment": segment,
        "role": role,
        "attrs": {
            "start_frame": 2 * segment,
            "grid": list(GRID),
            "prompt": "a red circle",
            "mix": 0.25,
            "guided": True,
        },
        "tokens": {
            "text": ["▁a", "▁red", "▁circle", "<pad>"],
            "id": np.array([3, 8, 9, 0]),
            "word": np.array([0, 1, 2, -1]),
            "is_pad": np.array([False, False, False, True]),
        },
        "words": words,
        "layers": LAYERS,
        "mass": mass / mass.sum(-1, keepdims=True),
        "maps": {"vt": lift(seed, len(words))},
        "word_frames": rng.random((len(LAYERS), HEADS, len(words), GRID[0])).astype(np.float32),
    }
    return SegmentRecord(**(fields | changes))


@cache
def heavy(kind: int) -> SegmentRecord:
    """A record whose file takes some milliseconds to write."""
    query, key = np.random.default_rng(kind).integers(-9, 9, (2, HEADS, 3000, 64)).astype(np.float16)
    return record(kind, qk={4: (query, key)})


def state(step: int) -> dict[str, Any]:
    """What a run would go on from after `step`; its file takes some milliseconds to write."""
    return {"step": step, "latents": np.full(400_000, step, np.float32)}


def write_run(folder: Path, steps: int = 2, **info) -> Run:
    """A finished run whose step s holds `record(seed=s)`."""
    with RunWriter.create(folder, {"prompt": "a red circle", **info}, "steps: 2\n") as writer:
        for step in range(steps):
            writer.write_step(step, {"timestep": 999 - step}, [record(step)], {"latents": np.full(3, step)})
    return Run(folder)


@contextmanager
def child(code: str, *arguments: object) -> Iterator[Child]:
    """Run python code in a process of its own that imports from this project and does not outlive the block."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield Child(process, process.stdout)
        finally:
            process.kill()
