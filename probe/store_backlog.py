"""Jobs that one background thread does in order, so that the model does not wait for compression or the disk."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from threading import Lock


class Backlog:
    """At most `limit` unfinished jobs; whoever adds one more waits, and nothing is dropped.

    The first error stops the backlog: jobs behind it are passed over, and the error is raised by the next `add` or
    `drain`. After that the backlog takes jobs again. When the interpreter ends, unfinished jobs are done first.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._pool = ThreadPoolExecutor(1, "store")
        self._jobs: deque[Future[None]] = deque()
        self._error: Exception | None = None
        self._lock = Lock()

    def add(self, job: Callable[[], None]) -> None:
        """Put a job at the end of the line, once there is room.

        Raises:
            Exception: what an earlier job raised; `job` is not taken.
        """
        with self._lock:
            self._settle(self._limit - 1)
            self._jobs.append(self._pool.submit(self._do, job))

    def drain(self) -> None:
        """Wait until every job is done.

        Raises:
            Exception: what a job raised.
        """
        with self._lock:
            self._settle(0)

    def close(self) -> None:
        """`drain`, and end the thread.

        Raises:
            Exception: what a job raised.
        """
        try:
            self.drain()
        finally:
            self._pool.shutdown(wait=False)

    def _do(self, job: Callable[[], None]) -> None:
        if self._error is None:
            try:
                job()
            except Exception as error:  # it is raised where the next job is added
                self._error = error

    def _settle(self, left: int) -> None:
        while len(self._jobs) > left:
            self._jobs[0].result()
            self._jobs.popleft()
        if self._error is not None:
            wait(self._jobs)
            self._jobs.clear()
            error, self._error = self._error, None
            raise error
