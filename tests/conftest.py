"""Keeps the tests off the network, and says at the end how long each folder of tests took."""

from __future__ import annotations

import os
from collections import defaultdict

import pytest

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # bits are compared on the CPU
os.environ.setdefault("OMP_NUM_THREADS", "1")  # toys are so small that a second thread only waits
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")

pytest_plugins = ["tests.capability"]

_seconds: defaultdict[str, float] = defaultdict(float)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Add the time of one set-up, call or tear-down to its folder."""
    _seconds[report.nodeid.partition("::")[0].rpartition("/")[0]] += report.duration


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the folders, slowest first."""
    for folder, seconds in sorted(_seconds.items(), key=lambda item: -item[1]):
        terminalreporter.write_line(f"{seconds:7.1f} s  {folder}/")
