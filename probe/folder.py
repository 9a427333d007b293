"""The run folder as files: their names, how one is replaced in one piece, and who is writing.

    run.json  recipe.yaml  video.mp4  video.gif  contact.png  steps/step_0007.h5  resume.h5  writer.lock

`writer.lock` names the writing process by id and start time, so that a lock left by a dead process is recognised.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from probe.errors import StoreError

FORMAT = "mmdit-lab run"
SCHEMA = 1
INFO, RECIPE, STEPS, RESUME, LOCK = "run.json", "recipe.yaml", "steps", "resume.h5", "writer.lock"

_STEP_NAME = re.compile(r"step_(\d{4,})\.h5")


def step_path(folder: Path, step: int) -> Path:
    """Where the file of one denoising step lies."""
    return folder / STEPS / f"step_{step:04d}.h5"


def step_files(folder: Path) -> dict[int, Path]:
    """Return the step files by step, in order; unfinished `.tmp` files are not among them."""
    found = {}
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for path in (folder / STEPS).iterdir():
            if match := _STEP_NAME.fullmatch(path.name):
                found[int(match[1])] = path
    return dict(sorted(found.items()))


def replace_file(path: Path, data: bytes | memoryview) -> None:
    """Write `data` to `path` so that a reader sees the old file or the whole new one, also after a power cut.

    Raises:
        OSError: the disk refused; `path` is as it was and nothing is left beside it.
    """
    draft = path.with_name(path.name + ".tmp")
    try:
        with draft.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def read_info(folder: Path) -> dict[str, Any]:
    """Return run.json of a run folder.

    Raises:
        StoreError: no folder, no run.json, not JSON, not a run of this project, or of a newer schema.
    """
    if not folder.is_dir():
        raise StoreError(f"run must be a folder. Got {folder}, which does not exist or is a file. Check the path.")
    path = folder / INFO
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StoreError(
            f"run folder must hold {INFO}. Got {folder} without one. Name the folder of one run."
        ) from None
    except ValueError:
        raise StoreError(f"{INFO} must be whole JSON. Got a damaged {path}. Restore it or run again.") from None
    except OSError as error:
        raise StoreError(f"{INFO} must be readable. Got {error.strerror} for {path}. Check its permissions.") from None
    if not isinstance(info, dict) or info.get("format") != FORMAT:
        raise StoreError(f"{INFO} must have the format '{FORMAT}'. Got a foreign {path}. Name the folder of one run.")
    if info.get("schema") != SCHEMA:
        raise StoreError(
            f"run schema must be {SCHEMA}. Got {info.get('schema')} in {path}. Read it with the version that wrote it."
        )
    return info


def write_info(folder: Path, info: dict[str, Any]) -> None:
    """Replace run.json in one piece.

    Raises:
        StoreError: a value is not plain data, or the disk refused.
    """
    try:
        text = json.dumps(info, indent=2, ensure_ascii=False, default=plain_value)
    except (TypeError, ValueError) as error:
        raise StoreError(f"run info must be plain data. Got {error}. Pass numbers, text, lists and dicts.") from None
    save_file(folder / INFO, (text + "\n").encode())


def plain_value(value: Any) -> Any:
    """Turn a numpy number or array, or a path, into plain data (the `default` of `json.dumps`)."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"a value of type {type(value).__name__}")


def save_file(path: Path, data: bytes | memoryview) -> None:
    """`replace_file` whose failure is one sentence: what was written, how much room there was, what is intact.

    Raises:
        StoreError: the disk refused; everything finished before is as it was.
    """
    try:
        replace_file(path, data)
    except OSError as error:
        raise StoreError(
            f"{path.name} must be written whole. Got '{error.strerror or error}' for {_size(len(data))} "
            f"in {path.parent} ({_free(path.parent)} free). Make room; everything finished before is intact."
        ) from error


def lock(folder: Path) -> None:
    """Make this process the writer of `folder`; a lock left by a dead process is taken over.

    Raises:
        StoreError: another live process, or this one, is writing there; or the disk refused.
    """
    if (pid := live_writer(folder)) is not None:
        raise StoreError(
            f"run folder must have one writer. Got {folder}, where process {pid} is writing. Wait for it or stop it."
        )
    path = folder / LOCK
    try:
        path.unlink(missing_ok=True)
        with path.open("x", encoding="utf-8") as file:
            json.dump({"pid": os.getpid(), "born": _born(os.getpid())}, file)
    except FileExistsError:
        raise StoreError(
            f"run folder must have one writer. Got {folder}, just taken by another. Wait for it."
        ) from None
    except OSError as error:
        unlock(folder)  # a full disk leaves an empty lock
        raise StoreError(f"run folder must be writable. Got '{error.strerror}' for {path}. Choose another.") from None


def unlock(folder: Path) -> None:
    """Give the folder up; a lock that is not there, or not to be removed, is left to `live_writer`."""
    with contextlib.suppress(OSError):
        (folder / LOCK).unlink()


def live_writer(folder: Path) -> int | None:
    """Return the id of the process that is writing `folder`, or None where there is none or it has died."""
    try:
        held = json.loads((folder / LOCK).read_text(encoding="utf-8"))
        pid, born = int(held["pid"]), held["born"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if born is not None:
        return pid if _born(pid) == born else None
    return pid if _answers(pid) else None


def _born(pid: int) -> str | None:
    """Start time of a live process in clock ticks since boot; None where /proc does not tell, or it is a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _answers(pid: int) -> bool:
    """Whether a process exists, where there is no /proc."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems sync files only
            os.fsync(handle)
    finally:
        os.close(handle)


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


def _free(folder: Path) -> str:
    try:
        return _size(shutil.disk_usage(folder).free)
    except OSError:
        return "an unknown amount"
