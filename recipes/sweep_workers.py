"""Who makes the runs of a sweep: this process, or others on this machine. A worker that dies loses one run, no more."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from functools import partial
from multiprocessing.connection import Connection
from typing import Protocol

from recipes.sweep import Task
from recipes.sweep_store import Row

Make = Callable[[Task], Row]
"""Makes one run and measures it; a run that fails is a row, too."""
Begin = Callable[[], Make]
"""Called once in each worker, and sent there: a function of a module, not of a function."""
PATIENCE = 10
"""Seconds that a process has to end by itself."""


class Worker(Protocol):
    """Makes one run at a time."""

    def submit(self, task: Task) -> Future[Row]:
        """Its row, some time; an exception means that the worker died."""
        ...

    def renew(self) -> None:
        """Begin again after it died."""

    def close(self) -> None:
        """Leave nothing behind; a run that is being made stays interrupted."""


class Here:
    """This very process."""

    def __init__(self, begin: Begin) -> None:
        self._make = begin()

    def submit(self, task: Task) -> Future[Row]:
        """Returns when the run is made."""
        future: Future[Row] = Future()
        future.set_result(self._make(task))
        return future

    def renew(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to do."""


class Process:
    """A process of its own, which ends when this one does."""

    def __init__(self, begin: Begin) -> None:
        self._begin = begin
        self._start()

    def submit(self, task: Task) -> Future[Row]:
        """Returns at once."""
        self._tasks.send(task)
        future: Future[Row] = Future()
        threading.Thread(target=self._receive, args=(future,), daemon=True).start()
        return future

    def renew(self) -> None:
        """A new process."""
        self.close()
        self._start()

    def close(self) -> None:
        """Ends the process; one that is not idle, and was not interrupted as well, in the middle of its run."""
        with contextlib.suppress(OSError):
            self._tasks.send(None)
        self._process.join(PATIENCE)
        self._process.terminate()
        self._process.join()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._tasks, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, self._begin), daemon=True)
        self._process.start()
        theirs.close()

    def _receive(self, future: Future[Row]) -> None:
        try:
            future.set_result(self._tasks.recv())
        except Exception:  # it ended, or what came is no row
            self._process.join(PATIENCE)
            future.set_exception(ChildProcessError(f"its process ended with {self._process.exitcode}"))


def _work(tasks: Connection, begin: Begin) -> None:
    """A process of a worker."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(KeyboardInterrupt, EOFError):
        make = begin()
        while (task := tasks.recv()) is not None:
            tasks.send(make(task))


def _end_with_parent() -> None:
    """Also where the parent was killed and could not end it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def carried_out(tasks: Iterable[Task], workers: Sequence[Worker]) -> Iterator[Row]:
    """The row of every task, as they come. A task whose worker died is tried once more, then it failed."""
    waiting, free = deque((task, False) for task in tasks), deque(workers)
    busy: dict[Future[Row], tuple[Worker, Task, bool]] = {}
    while waiting or busy:
        while waiting and free:
            (task, again), worker = waiting.popleft(), free.popleft()
            busy[_submitted(worker, task)] = worker, task, again
        for future in wait(busy, return_when=FIRST_COMPLETED).done:
            worker, task, again = busy.pop(future)
            error = future.exception()
            if error is not None:
                worker.renew()
            free.append(worker)
            if error is None:
                yield future.result()
            elif again:
                yield Row.failed(task, _death(error))
            else:
                waiting.appendleft((task, True))


def _submitted(worker: Worker, task: Task) -> Future[Row]:
    """One that died while it had nothing to do says so now."""
    try:
        return worker.submit(task)
    except Exception as error:
        future: Future[Row] = Future()
        future.set_exception(error)
        return future


def _death(error: BaseException) -> str:
    said = " ".join(str(error).split())
    return (
        f"A worker must live through its run. Got two that died: {said[:160].rstrip('.')}. Look for a lack of memory, "
        "and start the sweep again."
    )


@contextlib.contextmanager
def local(count: int, begin: Callable[[str | None], Make]) -> Iterator[list[Worker]]:
    """Workers on this machine, each on a GPU of its own as far as there are some. One alone is this process; `begin`
    gets the device of each, None for the usual one.
    """
    devices = _devices(count)
    workers: list[Worker] = []
    try:
        for device in devices:
            workers.append(Here(partial(begin, device)) if count == 1 else Process(partial(begin, device)))
        yield workers
    finally:
        for worker in workers:
            worker.close()


def _devices(count: int) -> list[str | None]:
    import torch

    there = torch.cuda.device_count() if torch.cuda.is_available() and count > 1 else 0
    return [f"cuda:{number % there}" if there else None for number in range(count)]
