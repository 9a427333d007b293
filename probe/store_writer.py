"""Writes a run folder: one step, one file, complete or absent; the status always tells how the run ended.

Steps are packed and written by one background thread, in order, at most two of them unfinished: a disk slower than the
model makes the model wait, and nothing is dropped. The state to resume from follows the file of its step.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np

from probe.errors import MmditError, StoreError
from probe.folder import (
    FORMAT,
    RECIPE,
    RESUME,
    SCHEMA,
    STEPS,
    lock,
    read_info,
    save_file,
    step_path,
    unlock,
    write_info,
)
from probe.store_backlog import Backlog
from probe.store_claim import make_room, refuse_taken
from probe.store_record import SegmentRecord
from probe.store_resume import pack_resume
from probe.store_step import pack_step

Status = Literal["done", "failed", "interrupted"]

_UNFINISHED = 2
_RESERVED = {"format", "schema", "status", "started", "finished", "error"}


class RunWriter:
    """The one writer of a run folder; make it with `create` or `reopen`, end it with `finish` or `with`.

    As a context manager it finishes by itself: an exception makes the run failed, Ctrl-C makes it interrupted. Steps
    that were handed over are written in either case, also when the interpreter ends without `finish`. Any thread of the
    process that made it may use it; a forked copy of that process may not.
    """

    def __init__(self, folder: Path, info: dict[str, Any]) -> None:
        self.folder = folder
        self._info = info
        self._open = True
        self._process = os.getpid()
        self._backlog = Backlog(_UNFINISHED)

    @classmethod
    def create(
        cls, folder: str | os.PathLike[str], info: Mapping[str, Any], recipe: str, force: bool = False
    ) -> RunWriter:
        """Start a run in a new or empty folder.

        Args:
            folder: made with its parents.
            info: provenance, plain data; goes into run.json.
            recipe: text of recipe.yaml.
            force: replace a run that is there already; a folder that is not a run of this project is never touched.

        Raises:
            StoreError: the folder is taken, foreign, being written, or cannot be made; or the disk refused.
        """
        path = Path(folder)
        _check_names(info)
        refuse_taken(path, force)
        make_room(path)
        lock(path)
        started = {"format": FORMAT, "schema": SCHEMA, "status": "running", "started": _now()}
        try:
            (path / STEPS).mkdir(exist_ok=True)
            save_file(path / RECIPE, recipe.encode())
            write_info(path, {**started, **info})
        except BaseException:
            shutil.rmtree(path, ignore_errors=True)  # it was new or empty, and half a run blocks the next try
            raise
        return cls(path, {**started, **info})

    @classmethod
    def reopen(cls, folder: str | os.PathLike[str]) -> RunWriter:
        """Go on with a run that stopped; the lock of a dead writer is taken over.

        Raises:
            StoreError: not a run folder, or another process is writing there.
        """
        path = Path(folder)
        info = read_info(path)
        lock(path)
        info = {name: value for name, value in info.items() if name not in ("finished", "error")} | {
            "status": "running"
        }
        try:
            write_info(path, info)
        except BaseException:
            unlock(path)
            raise
        return cls(path, info)

    def write_step(
        self,
        step: int,
        attrs: Mapping[str, Any],
        segments: Sequence[SegmentRecord],
        resume: Mapping[str, Any] | None = None,
    ) -> None:
        """Hand over one denoising step; its file appears whole, or not at all, and resume.h5 is replaced after it.

        The background thread reads the arrays of `segments` later: leave them as they are, and copy what shares
        memory with a tensor that changes. `resume` is copied at once.

        Args:
            step: number of the step, 0 from pure noise.
            attrs: plain data of the step: timestep, sigma, model, dtype, backend.
            segments: what was recorded; may be empty.
            resume: arrays (any numpy type, exact), bytes and plain data that a resumed run needs.

        Raises:
            StoreError: an earlier step could not be stored: it and those handed over after it are lost, all before it
                are intact. Errors of this step are raised by the next call of `write_step`, `flush` or `finish`.
        """
        if not self._open:
            raise StoreError(f"step {step} must come before the end of the run. Got it after. Start another run.")
        if step < 0:
            raise StoreError(f"step must be 0 or more. Got {step}. Count denoising steps from pure noise.")
        self._refuse_copy()
        attrs, segments, state = dict(attrs), tuple(segments), None if resume is None else _copied(resume)
        self._backlog.add(lambda: self._store(step, attrs, segments, state))

    def flush(self) -> None:
        """Wait until every step handed over is on the disk.

        Raises:
            StoreError: one of them could not be stored.
        """
        self._refuse_copy()
        self._backlog.drain()

    def finish(self, status: Status, error: str | None = None, **extra: Any) -> None:
        """End the run: wait for its steps; status, time and `extra` go into run.json in one piece; the lock goes away.

        Raises:
            StoreError: the status is not known; a step could not be stored (the run is failed then); or the disk
                refused (the run then reads as interrupted).
        """
        if status not in ("done", "failed", "interrupted"):
            raise StoreError(f"status must be done, failed or interrupted. Got {status!r}. Use one of these.")
        _check_names(extra)
        self._refuse_copy()
        try:
            self._backlog.close()
        except StoreError as lost:
            self._end("failed" if status == "done" else status, error or str(lost), extra)
            raise
        self._end(status, error, extra)

    def _store(
        self,
        step: int,
        attrs: Mapping[str, Any],
        segments: Sequence[SegmentRecord],
        state: Mapping[str, Any] | None,
    ) -> None:
        """Runs in the background thread."""
        try:
            after = None if state is None else pack_resume(step, state)
            save_file(step_path(self.folder, step), pack_step(step, attrs, segments))
            if after is not None:
                save_file(self.folder / RESUME, after)
        except MmditError:
            raise
        except Exception as error:  # out of memory, or what h5py says of a strange value
            raise StoreError(
                f"step {step} must be stored. Got {_sentence(error)}. Everything finished before is intact."
            ) from error

    def _end(self, status: Status, error: str | None, extra: Mapping[str, Any]) -> None:
        self._info |= {**extra, "status": status, "finished": _now()}
        if error is not None:
            self._info["error"] = error
        self._open = False
        try:
            write_info(self.folder, self._info)
        finally:
            unlock(self.folder)

    def _refuse_copy(self) -> None:
        """A forked process has the lock's name but not the thread that writes."""
        if os.getpid() != self._process:
            raise StoreError(
                f"run folder must be written by the process that opened it. Got process {os.getpid()}, a copy of "
                f"process {self._process}. Write from one of them."
            )

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._open:
            return
        if error is None:
            self.finish("done")
            return
        with contextlib.suppress(StoreError):  # the first error is the one to hear about
            self.finish("interrupted" if isinstance(error, KeyboardInterrupt) else "failed", _sentence(error))


def _copied(state: Mapping[str, Any]) -> dict[str, Any]:
    """The same with arrays of its own."""
    return {name: value.copy() if isinstance(value, np.ndarray) else value for name, value in state.items()}


def _sentence(error: BaseException) -> str:
    if isinstance(error, MmditError):
        return str(error)
    return f"{type(error).__name__}: {error}".rstrip(": ")


def _check_names(info: Mapping[str, Any]) -> None:
    if taken := sorted(_RESERVED & set(info)):
        raise StoreError(f"run info must leave {', '.join(taken)} to the store. Got these names. Choose other names.")


def _now() -> str:
    return datetime.now(UTC).isoformat()
