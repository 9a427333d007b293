"""Files that the reading commands write. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from probe.errors import StoreError, UsageError

Writer = Callable[[Path], None]


def write(writers: Mapping[str, Writer], kind: str | None, out: Path | None, stem: Path) -> Path:
    """Write the file of one kind, named by `kind` or by the ending of `out`, and return its path; without `out` it is
    `stem` and its kind.

    Raises:
        UsageError: there is no such kind, or `out` ends in another.
        StoreError: the file cannot be written.
    """
    kind = kind or (out.suffix[1:] if out else "")
    if kind not in writers or (out is not None and out.suffix != f".{kind}"):
        raise UsageError(
            f"An export must be a file ending in {', '.join('.' + name for name in writers)}. Got {out or kind}. "
            "Name --out by its kind, or leave it out."
        )
    path = out or stem.with_name(f"{stem.name}.{kind}")
    try:
        writers[kind](path)
    except OSError as error:
        raise StoreError(
            f"An export must be written to disk. Got '{error.strerror or error}' for {path}. Choose another --out."
        ) from error
    return path


def npz(path: Path, arrays: Mapping[str, Any]) -> None:
    """A compressed npz file of arrays, under exactly this name."""
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)
