"""Honest timings: methods interleaved in one run, each as a ratio to the plain one beside it.

On the CPU a time is the CPU time of the process, minimum over rounds: other programs on the machine hardly move it. On
CUDA it is the median of events. Memory is the peak that a method adds to what was there.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Method:
    """One thing to time. `run` does it once; `extra` says that its time comes on top of the plain one (else it stands
    in its place). `target` is the ratio it should stay below, None where none is set. `error` measures it against
    float64, `prepare` is called before each round and not timed.
    """

    group: str
    name: str
    run: Callable[[], Any]
    extra: bool = True
    target: float | None = None
    error: Callable[[], float] | None = None
    prepare: Callable[[], Any] | None = None


@dataclass(frozen=True)
class Timed:
    """A method and what was measured: seconds of one run, extra peak memory in bytes, error."""

    method: Method
    seconds: float
    memory: int
    error: float | None

    def facts(self, plain: float) -> dict[str, Any]:
        """What was measured, as numbers; the ratio is to `plain` seconds."""
        ratio, target = self.seconds / plain, self.method.target
        return {
            "group": self.method.group,
            "method": self.method.name,
            "ratio": ratio,
            "on top of plain": self.method.extra,
            "target": target,
            "met": None if target is None else ratio <= target,
            "seconds": self.seconds,
            "extra bytes": self.memory,
            "error": self.error,
        }

    def row(self, plain: float) -> dict[str, str]:
        """One line of the table."""
        sign, target = "+" if self.method.extra else "", self.method.target
        return {
            "method": self.method.name,
            "x plain": f"{sign}{self.seconds / plain:.3f}",
            "target": ""
            if target is None
            else f"{sign}{target:g} {'met' if self.seconds / plain <= target else 'MISSED'}",
            "ms": f"{1e3 * self.seconds:.2f}",
            "extra MB": f"{self.memory / 1e6:.1f}",
            "error": "" if self.error is None else f"{self.error:.1e}",
        }


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Torch computes with `count` threads inside, and as before after it."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure(methods: Sequence[Method], device: str, rounds: int, warm: int = 1) -> list[Timed]:
    """Time every method `rounds` times, one after the other in each round; the first `warm` rounds do not count."""
    times: list[list[float]] = [[] for _ in methods]
    for turn in range(warm + rounds):
        for kept, method in zip(times, methods, strict=True):
            seconds = _time(method, device)
            if turn >= warm:
                kept.append(seconds)
    best = min if device == "cpu" else statistics.median
    memory = [_memory(method, device) for method in methods]
    errors = [None if method.error is None else method.error() for method in methods]
    return [
        Timed(method, best(kept), extra, error)
        for method, kept, extra, error in zip(methods, times, memory, errors, strict=True)
    ]


def _time(method: Method, device: str) -> float:
    if method.prepare is not None:
        method.prepare()
    if device == "cpu":
        start = time.process_time()
        method.run()
        return time.process_time() - start
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    method.run()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / 1e3


def _memory(method: Method, device: str) -> int:
    """Bytes by which one run raises the peak."""
    if method.prepare is not None:
        method.prepare()
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        method.run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    reset = Path("/proc/self/clear_refs")
    try:
        reset.write_text("5")  # Linux: the peak of the resident set starts again from here
    except OSError:
        return 0
    before = _status("VmRSS")
    method.run()
    return max(0, _status("VmHWM") - before)


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    return 0


def header(device: str, dtype: torch.dtype) -> str:
    """What was timed on: torch, device, threads, dtype, the kernel of plain attention."""
    from probe import attend

    name = torch.cuda.get_device_name() if device != "cpu" else f"cpu, {torch.get_num_threads()} threads"
    kernel = attend.backend_name(device, dtype)
    return f"torch {torch.__version__}, {name}, {str(dtype)[6:]}, plain attention by {kernel}"
