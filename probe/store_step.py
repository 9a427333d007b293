"""One step file (HDF5): how it is laid out and packed into bytes.

    attrs                   format, schema, step, and what the writer adds (timestep, sigma, model, dtype, backend)
    segments/<k>/<role>/    attrs; layers; kinds; words; tokens/*; mass; frames; word_frames; metrics/<name>; columns;
                            token_mass; maps/{vt,vt_text,tv,mean}{,_lo,_hi}; qk/layer_15{,_self}/{q,k};
                            regions/{text_text,spatial,temporal}{,_lo,_hi}

An array whose attribute `kind` is set was read from that attention of the layers, not from the one in `kinds`.

A file opens with plain h5py or any HDF5 viewer: gzip and shuffle only, no plugins. Attributes are numbers and text; any
other value is JSON text that begins with `json:`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import h5py
import numpy as np

from probe import codec, folder
from probe.errors import StoreError
from probe.store_record import SegmentRecord

STEP_FORMAT = "mmdit-lab step"
JSON_MARK = "json:"

_SMALL = 4096
_GZIP = {"compression": "gzip", "compression_opts": 1, "shuffle": True}
_DIMS = {
    "mass": ("layer", "head", "rows", "columns"),
    "frames": ("layer", "head", "frame", "looked_at_frame"),
    "word_frames": ("layer", "head", "word", "frame"),
    "columns": ("layer", "head", "token"),
    "token_mass": ("layer", "head", "text_token"),
    "metrics": ("layer", "head"),
    "maps": ("layer", "head", "word", "frame", "row", "column"),
    "regions": ("layer", "head", "looking", "frame", "row", "column"),
}


def pack_step(step: int, attrs: Mapping[str, Any], segments: Sequence[SegmentRecord]) -> memoryview:
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
    return buffer.getbuffer()


def _put_segment(group: h5py.Group, record: SegmentRecord) -> None:
    put_attrs(group, {**record.attrs, "heads": record.heads})
    group["layers"] = np.asarray(record.layers, np.int32)
    _put_text(group, "kinds", record.kinds)
    _put_text(group, "words", record.words)
    for name, values in record.tokens.items():
        if name == "text":
            _put_text(group, f"tokens/{name}", values)
        else:
            group[f"tokens/{name}"] = np.asarray(values)
    for name, array in _floats(record):
        put_attrs(_put_floats(group, name, array), _said(record, name.removeprefix("metrics/")))
    for direction, lift in record.maps.items():
        codes = _put_codes(group, f"maps/{direction}", lift, (1, 1, 1, *np.shape(lift)[3:]))
        put_attrs(codes, {"units": "lift, 1 = uniform"})
    for name, chance in record.regions.items():
        codes = _put_codes(group, f"regions/{name}", chance, (1, 1, *np.shape(chance)[2:]), codec.UNIT)
        put_attrs(codes, {"units": "probability / unit", "unit": codec.UNIT, **record.region_facts.get(name, {})})
        put_attrs(codes, _said(record, name))
    _put_qk(group.require_group("qk") if record.qk else group, record)


def _said(record: SegmentRecord, name: str) -> dict[str, str]:
    """The attributes of an array: what it is, and its kind of attention where that is not the layers'."""
    given = {"long_name": record.metric_info.get(name), "kind": record.other_kinds.get(name)}
    return {attr: text for attr, text in given.items() if text is not None}


def _put_qk(group: h5py.Group, record: SegmentRecord) -> None:
    """Write query and key; the second attention of a layer has its kind in its name."""
    for site, pair in record.qk.items():
        layer, kind = (site, _kind_of(record, site)) if isinstance(site, int) else site
        name = f"layer_{layer:02d}"
        place = group.create_group(f"{name}_{kind}" if name in group else name)
        put_attrs(place, {"kind": kind})
        for tensor, array in zip("qk", pair, strict=True):
            place[tensor] = _half(array, layer)


def _kind_of(record: SegmentRecord, layer: int) -> str:
    return dict(zip(record.layers, record.kinds, strict=True)).get(layer, "joint")


def _floats(record: SegmentRecord) -> Iterator[tuple[str, np.ndarray]]:
    """The arrays that are kept as float32, by name."""
    for name in ("mass", "frames", "word_frames", "columns", "token_mass"):
        if (array := getattr(record, name)) is not None:
            yield name, array
    for name, array in record.metrics.items():
        yield f"metrics/{name}", array


def _put_floats(group: h5py.Group, name: str, array: np.ndarray) -> h5py.Dataset:
    """Write an array [L, ...] with one chunk per layer; a small one in one piece, since a chunk costs 3 kB."""
    options: dict[str, Any] = {"chunks": (1, *np.shape(array)[1:]), **_GZIP} if np.size(array) > _SMALL else {}
    data = group.create_dataset(name, data=np.asarray(array, np.float32), **options)
    _label(data, name)
    return data


def _put_codes(
    group: h5py.Group, name: str, values: np.ndarray, chunks: tuple[int, ...], unit: float = 1.0
) -> h5py.Dataset:
    """Write values / unit as codes, layer by layer (one layer in memory)."""
    shape = np.shape(values)
    options: dict[str, Any] = {"chunks": chunks, **_GZIP} if np.size(values) else {}
    codes = group.create_dataset(name, shape, np.uint8, **options)
    edges = [group.create_dataset(f"{name}_{edge}", shape[:3], np.float32) for edge in ("lo", "hi")]
    for layer in range(shape[0]):
        codes[layer], *ranges = codec.encode(np.asarray(values[layer]) / np.float32(unit))
        for edge, limits in zip(edges, ranges, strict=True):
            edge[layer] = limits
    put_attrs(codes, {"encoding": codec.ENCODING, "floor": codec.FLOOR})
    for data in (codes, *edges):
        _label(data, name)
    return codes


def _half(array: np.ndarray, layer: int) -> np.ndarray:
    """Query or key as float16.

    Raises:
        StoreError: a value is not finite there.
    """
    with np.errstate(over="ignore"):
        half = np.asarray(array).astype(np.float16)
    if not np.isfinite(half).all():
        worst = np.abs(np.asarray(array)).max()
        raise StoreError(
            f"query and key must fit into float16, at most 65504. Got {worst:.6g} in layer {layer}. Keep another layer."
        )
    return half


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


def _label(data: h5py.Dataset, name: str) -> None:
    for axis, label in zip(data.dims, _DIMS[name.partition("/")[0]], strict=False):
        axis.label = label
