"""Reads one step file: first its head (what is there), then single arrays of it.

Heads are small and never change once a file is in place, so a reader keeps them; arrays are read when asked for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from probe import codec
from probe.errors import StoreError
from probe.folder import SCHEMA
from probe.store_record import DIRECTIONS
from probe.store_step import JSON_MARK, STEP_FORMAT

Place = tuple[int, str]
"""A segment and its role."""


@dataclass(frozen=True)
class SegmentHead:
    """What one step file holds of one segment and role: shapes and names, no arrays."""

    attrs: dict[str, Any]
    words: tuple[str, ...]
    layers: tuple[int, ...]
    heads: dict[str, int]
    """Number of heads of each recorded array, by its name: mass, frames, word_frames, maps/vt, maps/tv."""
    qk: tuple[int, ...]

    @property
    def mean_heads(self) -> bool:
        """Whether the maps hold the mean over heads only."""
        return self.attrs["heads"] == "mean"


@dataclass(frozen=True)
class StepHead:
    """What one step file holds."""

    path: Path
    attrs: dict[str, Any]
    segments: dict[Place, SegmentHead]
    has_resume: bool


def opens(path: Path) -> bool:
    """Whether the file can be opened at all; a truncated one cannot."""
    try:
        with h5py.File(path, "r"):
            return True
    except OSError:
        return False


def read_head(path: Path) -> StepHead:
    """Return what the file holds.

    Raises:
        StoreError: the file is truncated, foreign, or of a newer schema.
    """
    with _open(path) as file:
        attrs = _read_attrs(file)
        if attrs.get("format") != STEP_FORMAT or attrs.get("schema") != SCHEMA:
            raise StoreError(
                f"step file must be a '{STEP_FORMAT}' of schema {SCHEMA}. "
                f"Got {path} with {attrs.get('format')!r}, {attrs.get('schema')!r}. Move it away or run again."
            )
        segments = {
            (int(number), role): _read_segment(group)
            for number, roles in file.get("segments", {}).items()
            for role, group in roles.items()
        }
        return StepHead(path, attrs, dict(sorted(segments.items())), "resume" in file)


def _read_segment(group: Any) -> SegmentHead:
    names = ("mass", "frames", "word_frames", *(f"maps/{direction}" for direction in DIRECTIONS))
    return SegmentHead(
        attrs=_read_attrs(group),
        words=tuple(group["words"].asstr()[...]),
        layers=tuple(int(layer) for layer in group["layers"][...]),
        heads={name: group[name].shape[1] for name in names if name in group},
        qk=tuple(sorted(int(name.removeprefix("layer_")) for name in group.get("qk", {}))),
    )


def read_map(path: Path, place: Place, direction: str, layer: int | None, head: int | None, word: int) -> np.ndarray:
    """Return lift float32 [F, Y, X] of one word; layer and head count along the file's axes, None is the mean.

    Raises:
        StoreError: the file is damaged.
    """
    at = (_along(layer), _along(head), word)
    with _open(path) as file:
        maps = file[_group(place)]["maps"]
        codes, lo, hi = (maps[f"{direction}{part}"][at] for part in ("", "_lo", "_hi"))
    return codec.decode(codes, lo, hi).mean((0, 1), dtype=np.float64).astype(np.float32)


def read_array(path: Path, place: Place, name: str) -> np.ndarray:
    """Return one array of a segment, as it was written (mass, frames, word_frames, qk/layer_15/q).

    Raises:
        StoreError: the file is damaged.
    """
    with _open(path) as file:
        return file[_group(place)][name][...]


def read_tokens(path: Path, place: Place) -> dict[str, np.ndarray]:
    """Return the token arrays [N] of a segment: text, id, word, is_pad.

    Raises:
        StoreError: the file is damaged.
    """
    with _open(path) as file:
        tokens = file[_group(place)]["tokens"]
        return {
            name: np.array(list(data.asstr()[...]), dtype=str) if name == "text" else data[...]
            for name, data in tokens.items()
        }


def read_resume(path: Path) -> dict[str, Any]:
    """Return what the writer was given as `resume`: arrays and bytes exact, other values as Python values.

    Raises:
        StoreError: the file is damaged.
    """
    with _open(path) as file:
        group = file["resume"]
        found = _read_attrs(group)
        for name, data in group.items():
            array = np.asarray(data[()])
            found[name] = array.tobytes() if data.attrs.get("kind") == "bytes" else array
        return found


def _read_attrs(target: h5py.Group | h5py.File) -> dict[str, Any]:
    return {name: _plain(value) for name, value in target.attrs.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, str) and value.startswith(JSON_MARK):
        return json.loads(value.removeprefix(JSON_MARK))
    return value.item() if isinstance(value, np.generic) else value


def _group(place: Place) -> str:
    return f"segments/{place[0]}/{place[1]}"


def _along(index: int | None) -> slice:
    return slice(None) if index is None else slice(index, index + 1)


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    """Open for reading; whatever HDF5 or a missing name says about a damaged file becomes one sentence."""
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, KeyError, RuntimeError, AttributeError, ValueError) as error:
        raise StoreError(
            f"step file must be whole. Got a damaged or unreadable {path} ({error}). Remove it, or run that step again."
        ) from error
