"""Workers of a sweep on a Ray cluster, which need this project and the sweep's folder on every machine."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

from probe.errors import UsageError
from recipes.sweep import Task
from recipes.sweep_store import Row
from recipes.sweep_workers import Begin, Make


@contextlib.contextmanager
def cluster(address: str, count: int | None, begin: Begin) -> Iterator[list[Actor]]:
    """Workers on a cluster: `address` "auto" is one that runs already, "local" starts one on this machine, anything
    else is where it is. Each takes one CPU, and one GPU where there are some; `count` None is one per GPU, or one.

    Raises:
        UsageError: Ray is not installed, the cluster does not answer, or is too small.
    """
    ray = _ray()
    _connect(ray, address)
    try:
        there = ray.cluster_resources()
        cpus, gpus = int(there.get("CPU", 0)), int(there.get("GPU", 0))
        most, what = (min(cpus, gpus), "GPU and a CPU") if gpus else (cpus, "CPU")
        count = count or gpus or 1
        if count > most:
            raise UsageError(
                f"A cluster must have a {what} for every worker. Got {count} workers and {most}. Lower --workers."
            )
        workers = [Actor(ray, begin, 1 if gpus else 0) for _ in range(count)]
        try:
            yield workers
        finally:
            for worker in workers:
                worker.close()
    finally:
        ray.shutdown()


class Actor:
    """One worker, an actor of Ray."""

    def __init__(self, ray: Any, begin: Begin, gpus: int) -> None:
        self._ray, self._begin = ray, begin
        self._kind = ray.remote(num_cpus=1, num_gpus=gpus)(_There)
        self._actor = self._kind.remote(begin)

    def submit(self, task: Task) -> Future[Row]:
        """Returns at once."""
        return self._actor.carry_out.remote(task).future()

    def renew(self) -> None:
        """A new actor, on whatever machine there is room."""
        self.close()
        self._actor = self._kind.remote(self._begin)

    def close(self) -> None:
        """Ends the actor, also in the middle of a run."""
        self._ray.kill(self._actor)


class _There:
    """What lives in the process of an actor."""

    def __init__(self, begin: Begin) -> None:
        self._make: Make = begin()

    def carry_out(self, task: Task) -> Row:
        if not task.out.is_dir():
            return Row.failed(
                task,
                f"The folder of a sweep must lie where every machine sees it. Got no {task.out} on {platform.node()}. "
                "Choose an --out on a shared file system.",
            )
        return self._make(task)


def _ray() -> Any:
    try:
        import ray
    except ModuleNotFoundError:
        raise UsageError('A cluster needs Ray. Got none installed. Run: pip install ".[cluster]"') from None
    return ray


def _connect(ray: Any, address: str) -> None:
    """A cluster of our own has no dashboard and reports nothing to anybody."""
    own = {"include_dashboard": False} if address == "local" else {}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", **own)
    except Exception as error:  # no cluster, no such address, another version of Ray there
        said = " ".join(str(error).split())[:200].rstrip(".")
        raise UsageError(
            f"A cluster must answer. Got {type(error).__name__} from {address}: {said}. Begin one with `ray start "
            "--head`, or take --cluster local."
        ) from error
