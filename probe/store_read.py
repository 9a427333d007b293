"""Reads one step file: first its head (what is there), then single arrays of it.

Heads are small and never change once a file is in place, so a reader keeps them; arrays are read when asked for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from probe import codec
from probe.errors import StoreError
from probe.folder import SCHEMA
from probe.store_record import DIRECTIONS, REGIONS
from probe.store_step import JSON_MARK, STEP_FORMAT

Place = tuple[int, str]
"""A segment and its role."""

_CODED = (*(f"maps/{one}" for one in DIRECTIONS), *(f"regions/{one}" for one in REGIONS))
_ARRAYS = ("mass", "frames", "word_frames", "columns", "token_mass", *_CODED)


@dataclass(frozen=True)
class SegmentHead:
    """What one step file holds of one segment and role: shapes and names, no arrays."""

    attrs: dict[str, Any]
    words: tuple[str, ...]
    layers: tuple[int, ...]
    kinds: tuple[str, ...]
    heads: dict[str, int]
    """Number of heads of each recorded array, by its name: mass, frames, maps/vt, regions/spatial, metrics/entropy and
    so on.
    """
    metrics: dict[str, str]
    """Definition of each metric, by its name; empty where none was given."""
    other_kinds: dict[str, str]
    """Attention of the arrays that do not read the layers' own, by name."""
    qk: dict[int, dict[str, str]]
    """Name of the group of each kept query and key, by layer and kind of attention."""
    regions: dict[str, dict[str, Any]]
    """What the writer said about each region map, by its name: heads, and the frame of the spatial one."""

    def mean_heads(self, name: str) -> bool:
        """Whether an array holds the mean over heads only."""
        group, _, one = name.rpartition("/")
        said = self.attrs if group == "maps" else self.regions[one] if group == "regions" else {}
        return said.get("heads") == "mean"


@dataclass(frozen=True)
class StepHead:
    """What one step file holds."""

    path: Path
    attrs: dict[str, Any]
    segments: dict[Place, SegmentHead]


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
        attrs = read_attrs(file)
        check_format(attrs, path, "step file", STEP_FORMAT, "Move it away or run again.")
        segments = {
            (int(number), role): _read_segment(group)
            for number, roles in file.get("segments", {}).items()
            for role, group in roles.items()
        }
        return StepHead(path, attrs, dict(sorted(segments.items())))


def _read_segment(group: Any) -> SegmentHead:
    layers = tuple(int(layer) for layer in group["layers"][...])
    names = [name for name in _ARRAYS if name in group]
    names += [f"metrics/{name}" for name in group.get("metrics", {})]
    kinds = tuple(group["kinds"].asstr()[...]) if "kinds" in group else ("joint",) * len(layers)
    return SegmentHead(
        attrs=read_attrs(group),
        words=tuple(group["words"].asstr()[...]),
        layers=layers,
        kinds=kinds,
        heads={name: group[name].shape[1] for name in names},
        metrics={name: str(data.attrs.get("long_name", "")) for name, data in group.get("metrics", {}).items()},
        other_kinds={name: str(group[name].attrs["kind"]) for name in names if "kind" in group[name].attrs},
        qk=_read_qk(group.get("qk", {}), dict(zip(layers, kinds, strict=True))),
        regions={one: read_attrs(group[f"regions/{one}"]) for one in REGIONS if f"regions/{one}" in names},
    )


def _read_qk(groups: Any, kinds: dict[int, str]) -> dict[int, dict[str, str]]:
    """The kept query and key; a layer's own kind comes first."""
    found: dict[int, dict[str, str]] = {}
    for name in sorted(groups):
        layer = int(name.split("_")[1])
        kind = str(groups[name].attrs.get("kind", kinds.get(layer, "joint")))
        found.setdefault(layer, {})[kind] = f"qk/{name}"
    return dict(sorted(found.items()))


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


def read_region(path: Path, place: Place, name: str, layer: int | None, head: int | None) -> np.ndarray:
    """Return probabilities float64 [R, F, Y, X] of one region map, layer by layer; layer and head as in `read_map`.

    Raises:
        StoreError: the file is damaged.
    """
    with _open(path) as file:
        maps = file[_group(place)]["regions"]
        layers = range(len(maps[name])) if layer is None else (layer,)
        total = np.zeros(maps[name].shape[2:])
        for at in layers:
            coded = (maps[f"{name}{part}"][at, _along(head)] for part in ("", "_lo", "_hi"))
            total += codec.decode(*coded).mean(0, dtype=np.float64)
        return total * (maps[name].attrs["unit"] / len(layers))


def read_array(path: Path, place: Place, name: str, at: Any = ...) -> np.ndarray:
    """Return one array of a segment, or the part `at` of it, as it was written.

    `name` is mass, frames, metrics/entropy, qk/layer_15/q and so on.

    Raises:
        StoreError: the file is damaged.
    """
    with _open(path) as file:
        return file[_group(place)][name][at]


def read_part(path: Path, place: Place, name: str, layer: int | None, head: int | None) -> np.ndarray:
    """Return [1 or L, 1 or H, ...] of an array; layer and head count along the file's axes, None is all of them.

    Raises:
        StoreError: the file is damaged.
    """
    return read_array(path, place, name, (_along(layer), _along(head)))


def read_shape(path: Path, place: Place, name: str) -> tuple[int, ...]:
    """Return the shape of one array of a segment.

    Raises:
        StoreError: the file is damaged.
    """
    with _open(path) as file:
        return file[_group(place)][name].shape


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


def read_attrs(target: h5py.Group | h5py.File) -> dict[str, Any]:
    """Attributes as the writer was given them."""
    return {name: _plain(value) for name, value in target.attrs.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, str) and value.startswith(JSON_MARK):
        return json.loads(value.removeprefix(JSON_MARK))
    return value.item() if isinstance(value, np.generic) else value


def _group(place: Place) -> str:
    return f"segments/{place[0]}/{place[1]}"


def _along(index: int | None) -> slice:
    return slice(None) if index is None else slice(index, index + 1)


def check_format(attrs: dict[str, Any], path: Path, thing: str, wanted: str, advice: str) -> None:
    """Refuse a file of another kind or schema.

    Raises:
        StoreError: what it must be, and what it is.
    """
    if attrs.get("format") != wanted or attrs.get("schema") != SCHEMA:
        raise StoreError(
            f"{thing} must be a '{wanted}' of schema {SCHEMA}. "
            f"Got {path} with {attrs.get('format')!r}, {attrs.get('schema')!r}. {advice}"
        )


@contextmanager
def open_file(path: Path, thing: str, advice: str) -> Iterator[Any]:
    """Open for reading; whatever HDF5 or a missing name says about a damaged file becomes one sentence.

    Raises:
        StoreError: the file is damaged, or gone.
    """
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, KeyError, RuntimeError, AttributeError, ValueError) as error:
        raise StoreError(f"{thing} must be whole. Got a damaged or unreadable {path} ({error}). {advice}") from error


def _open(path: Path) -> AbstractContextManager[Any]:
    return open_file(path, "step file", "Remove it, or run that step again.")
