"""Writes a run folder: one step, one file, complete or absent; the status always tells how the run ended."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from probe.errors import MmditError, StoreError
from probe.folder import (
    FORMAT,
    RECIPE,
    SCHEMA,
    STEPS,
    live_writer,
    lock,
    read_info,
    save_file,
    step_path,
    unlock,
    write_info,
)
from probe.store_record import SegmentRecord
from probe.store_step import pack_step

Status = Literal["done", "failed", "interrupted"]

_RESERVED = {"format", "schema", "status", "started", "finished", "error"}


class RunWriter:
    """The one writer of a run folder; make it with `create` or `reopen`, end it with `finish` or `with`.

    As a context manager it finishes by itself: an exception makes the run failed, Ctrl-C makes it interrupted.
    """

    def __init__(self, folder: Path, info: dict[str, Any]) -> None:
        self.folder = folder
        self._info = info
        self._open = True

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
        _make_room(path)
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
        """Write one denoising step; its file appears whole, or not at all.

        Args:
            step: number of the step, 0 from pure noise.
            attrs: plain data of the step: timestep, sigma, model, dtype, backend.
            segments: what was recorded; may be empty.
            resume: arrays (any numpy type, exact), bytes and plain data that a resumed run needs.

        Raises:
            StoreError: a value cannot be stored, or the disk refused; earlier steps are intact.
        """
        if not self._open:
            raise StoreError(f"step {step} must come before the end of the run. Got it after. Start another run.")
        if step < 0:
            raise StoreError(f"step must be 0 or more. Got {step}. Count denoising steps from pure noise.")
        save_file(step_path(self.folder, step), pack_step(step, attrs, segments, resume))

    def finish(self, status: Status, error: str | None = None, **extra: Any) -> None:
        """End the run: status, time and `extra` go into run.json in one piece, and the lock goes away.

        Raises:
            StoreError: the status is not known, or the disk refused (the run then reads as interrupted).
        """
        if status not in ("done", "failed", "interrupted"):
            raise StoreError(f"status must be done, failed or interrupted. Got {status!r}. Use one of these.")
        _check_names(extra)
        self._info |= {**extra, "status": status, "finished": _now()}
        if error is not None:
            self._info["error"] = error
        self._open = False
        try:
            write_info(self.folder, self._info)
        finally:
            unlock(self.folder)

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


def _sentence(error: BaseException) -> str:
    if isinstance(error, MmditError):
        return str(error)
    return f"{type(error).__name__}: {error}".rstrip(": ")


def _check_names(info: Mapping[str, Any]) -> None:
    if taken := sorted(_RESERVED & set(info)):
        raise StoreError(f"run info must leave {', '.join(taken)} to the store. Got these names. Choose other names.")


def _now() -> str:
    return datetime.now(UTC).isoformat()


def refuse_taken(folder: str | os.PathLike[str], force: bool = False) -> None:
    """Check, before any work is done, that `RunWriter.create` would take the folder; nothing is touched.

    Raises:
        StoreError: the folder is taken, foreign, being written, or a file stands in the way.
    """
    path = Path(folder)
    with _one_sentence(path):
        for place in (path, *path.parents):
            if place.is_file():
                raise StoreError(
                    f"run folder must be a folder in a folder. Got {path}, where {place} is a file. Choose another."
                )
        held = len(list(path.iterdir())) if path.exists() else 0
    if held and not force:
        raise StoreError(
            f"run folder must be new or empty. Got {path}, which holds {held} {'entry' if held == 1 else 'entries'}. "
            "Choose another path, or pass --force to replace an earlier run."
        )
    if held:
        _check_run(path)


def _make_room(path: Path) -> None:
    """Make `path` an empty folder; whatever `refuse_taken` let through is deleted."""
    with _one_sentence(path):
        if path.exists() and any(path.iterdir()):
            shutil.rmtree(path)
        path.mkdir(parents=True, exist_ok=True)


def _check_run(path: Path) -> None:
    """Refuse to replace anything but a run of this project that nobody is writing."""
    try:
        read_info(path)
    except StoreError as error:
        raise StoreError(
            f"--force must replace an earlier run. Got {path}, which is none ({error}) Nothing was deleted."
        ) from None
    if (pid := live_writer(path)) is not None:
        raise StoreError(f"--force must not replace a run in progress. Got {path}, written by process {pid}. Stop it.")


@contextlib.contextmanager
def _one_sentence(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"run folder must be writable. Got '{error.strerror or error}' for {error.filename or path}. "
            "Choose another path."
        ) from None
