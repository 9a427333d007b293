"""Takes a folder for a new run: which folders may be taken, and which are never touched."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from probe.errors import StoreError
from probe.folder import live_writer, read_info


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


def make_room(path: Path) -> None:
    """Make `path` an empty folder; whatever `refuse_taken` let through is deleted.

    Raises:
        StoreError: the disk refused.
    """
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
