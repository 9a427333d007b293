"""One step file (HDF5): how it is laid out and packed into bytes.

    attrs                   format, schema, step, and what the writer adds (timestep, sigma, model, dtype, backend)
    resume/                 what a resumed run needs, exact types
    segments/<k>/<role>/    attrs; layers; words; tokens/*; mass; frames; word_frames; maps/{vt,tv}{,_lo,_hi};
                            qk/layer_15/{q,k}

A file opens with plain h5py or any HDF5 viewer: gzip and shuffle only, no plugins. Attributes are numbers and text; any
other value is JSON text that begins with `json:`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import h5py
import numpy as np

from probe import codec, folder
from probe.errors import StoreError
from probe.store_record import SegmentRecord

STEP_FORMAT = "mmdit-lab step"

_GZIP = {"compression": "gzip", "compression_opts": 1, "shuffle": True}
JSON_MARK = "json:"
_DIMS = {
    "mass": ("layer", "head", "rows", "columns"),
    "frames": ("layer", "head", "frame", "looked_at_frame"),
    "word_frames": ("layer", "head", "word", "frame"),
    "maps": ("layer", "head", "word", "frame", "row", "column"),
}


def pack_step(
    step: int, attrs: Mapping[str, Any], segments: Sequence[SegmentRecord], resume: Mapping[str, Any] | None
) -> memoryview:
    """Return the bytes of a step file.

    It is made in memory, so that the disk sees one plain write and HDF5 is never left half-way through a file.

    Raises:
        StoreError: two records of one segment and role, a map with NaN, or a value that cannot be stored.
    """
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        put_attrs(file, {**attrs, "format": STEP_FORMAT, "schema": folder.SCHEMA, "step": step})
        for record in segments:
            name = f"segments/{record.segment}/{record.role}"
            if name in file:
                raise StoreError(f"{name} must be written once in a step. Got it twice in step {step}. Merge the two.")
            _put_segment(file.create_group(name), record)
        if resume is not None:
            _put_resume(file.create_group("resume"), resume)
    return buffer.getbuffer()


def _put_segment(group: h5py.Group, record: SegmentRecord) -> None:
    put_attrs(group, {**record.attrs, "heads": record.heads})
    group["layers"] = np.asarray(record.layers, np.int32)
    _put_text(group, "words", record.words)
    for name, values in record.tokens.items():
        if name == "text":
            _put_text(group, f"tokens/{name}", values)
        else:
            group[f"tokens/{name}"] = np.asarray(values)
    for name in ("mass", "frames", "word_frames"):
        array = getattr(record, name)
        if array is not None:
            data = group.create_dataset(name, data=np.asarray(array, np.float32), **_filters(array))
            _label(data, _DIMS[name])
    for direction, lift in record.maps.items():
        _put_maps(group.require_group("maps"), direction, lift)
    for layer, pair in record.qk.items():
        for name, array in zip("qk", pair, strict=True):
            group[f"qk/layer_{layer:02d}/{name}"] = np.asarray(array, np.float16)


def _put_maps(group: h5py.Group, direction: str, lift: np.ndarray) -> None:
    """Write codes layer by layer (one layer in memory), with one chunk per layer, head and word."""
    shape = np.shape(lift)
    options: dict[str, Any] = {"chunks": (1, 1, 1, *shape[3:]), **_GZIP} if np.size(lift) else {}
    codes = group.create_dataset(direction, shape, np.uint8, **options)
    edges = [group.create_dataset(f"{direction}_{edge}", shape[:3], np.float32) for edge in ("lo", "hi")]
    for layer in range(shape[0]):
        codes[layer], *ranges = codec.encode(np.asarray(lift[layer]))
        for edge, values in zip(edges, ranges, strict=True):
            edge[layer] = values
    put_attrs(codes, {"encoding": codec.ENCODING, "floor": codec.FLOOR, "units": "lift, 1 = uniform"})
    for data in (codes, *edges):
        _label(data, _DIMS["maps"])


def _put_resume(group: h5py.Group, resume: Mapping[str, Any]) -> None:
    for name, value in resume.items():
        if not name or "/" in name or name == ".":
            raise StoreError(f"resume names must be plain words. Got {name!r}. Leave out the slash.")
        if isinstance(value, bytes):
            group[name] = np.frombuffer(value, np.uint8)
            group[name].attrs["kind"] = "bytes"
        elif isinstance(value, np.ndarray):
            group[name] = value
        else:
            put_attrs(group, {name: value})


def put_attrs(target: h5py.Group | h5py.Dataset, attrs: Mapping[str, Any]) -> None:
    """Write attributes: numbers and text as they are, any other plain data as JSON text.

    Raises:
        StoreError: a value is not plain data.
    """
    for name, value in attrs.items():
        value = value.item() if isinstance(value, np.generic) else value
        plain = isinstance(value, (bool, float)) or (isinstance(value, int) and -(2**63) <= value < 2**63)
        plain = plain or (isinstance(value, str) and not value.startswith(JSON_MARK) and "\0" not in value)
        try:
            target.attrs[name] = value if plain else JSON_MARK + json.dumps(value, default=folder.plain_value)
        except (TypeError, ValueError) as error:
            raise StoreError(
                f"attribute {name} must be plain data. Got {error}. Pass numbers, text or lists."
            ) from None


def _put_text(group: h5py.Group, name: str, values: Sequence[str]) -> None:
    group.create_dataset(name, (len(values),), h5py.string_dtype())[...] = [str(value) for value in values]


def _filters(array: np.ndarray) -> dict[str, Any]:
    return _GZIP if np.size(array) else {}


def _label(data: h5py.Dataset, names: Sequence[str]) -> None:
    for axis, name in zip(data.dims, names, strict=False):
        axis.label = name
