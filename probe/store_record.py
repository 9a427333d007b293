"""What one step of one segment left behind, before it is written: a record whose shapes are checked once.

Letters: L recorded layers, H heads, W words, R rows of a region map, F token frames, Y rows and X columns of patches,
T text tokens, N tokens of the attention, D head width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from probe.errors import StoreError
from probe.site import KINDS, ROLES

DIRECTIONS = ("vt", "vt_text", "tv", "mean")
REGIONS = ("text_text", "spatial", "temporal")
TOKEN_FIELDS = ("text", "id", "word", "is_pad")


@dataclass(frozen=True, eq=False)
class SegmentRecord:
    """What was recorded of one segment and role in one denoising step.

    The arrays are written by a background thread: they must not change once the record is handed over.

    Attributes:
        segment: number of the window of the long latent; a plain run has one, 0.
        role: plain, source or target.
        attrs: plain data, for example start frame, grid, prompt, weight of the next prompt, guided. `order`
            (text-video or video-text) and `scale` of the attention tell how `qk` is read.
        tokens: arrays [T] of the branch's text: `text` (str), `id` (int), `word` (int), `is_pad` (bool).
        words: the recorded words, in the order of the W axis.
        layers: the recorded layers, in the order of the L axis.
        kinds: attention of each recorded layer: joint, double, single, self or cross; () makes all of them joint.
        other_kinds: attention of an array that is not that of the layers, by name: `frames`, or a metric.
        mass: float [L, H, 3, 4], rows (text, padding, video) x columns (text, padding, video same frame, video other
            frames), as probabilities; NaN where a model has no such rows; or None.
        maps: lift (1.0 = uniform) float [L, H, W, F, Y, X] by direction, one of DIRECTIONS; H is 1 where `heads`
            is "mean".
        heads: whether the maps hold each head, or the mean over heads.
        word_frames: float [L, H, W, F], what the video rows of each frame give to each word; or None.
        frames: float [L, H, F, C], frame by frame attention, C = F or F + 1 with the text last; or None.
        metrics: float [L, H] by name, one number per layer and head; NaN where it is not defined.
        metric_info: one line by name of a metric: what it is, its range and unit.
        columns: float [L, H, N], mean attention that each key receives, sums to 1; or None.
        token_mass: float [L, H, T], mean attention that the video rows give to each text token; or None.
        regions: region maps by name, one of REGIONS: probabilities float [L, H, R, F, Y, X], stored in one byte
            (`probe.codec`); see `probe.readout.region_map`.
        region_facts: plain data by name of a region map: `heads`, "each" or "mean" (H is 1 then), and the `frame` of
            the spatial one.
        qk: query and key, float [H, N, D] each, by layer, or by layer and kind; stored as float16, after
            normalisation and rotation.

    Raises:
        StoreError: a name is not known, or a shape does not fit the others.
    """

    segment: int
    role: str
    attrs: Mapping[str, Any]
    tokens: Mapping[str, Any]
    words: tuple[str, ...]
    layers: tuple[int, ...]
    kinds: tuple[str, ...] = ()
    mass: np.ndarray | None = None
    maps: Mapping[str, np.ndarray] = field(default_factory=dict)
    heads: Literal["each", "mean"] = "each"
    word_frames: np.ndarray | None = None
    frames: np.ndarray | None = None
    metrics: Mapping[str, np.ndarray] = field(default_factory=dict)
    metric_info: Mapping[str, str] = field(default_factory=dict)
    columns: np.ndarray | None = None
    token_mass: np.ndarray | None = None
    regions: Mapping[str, np.ndarray] = field(default_factory=dict)
    region_facts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    qk: Mapping[int | tuple[int, str], tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    other_kinds: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_name("segment role", self.role, ROLES)
        _check_name("heads", self.heads, ("each", "mean"))
        _check_tokens(self.tokens)
        count, words = len(self.layers), len(self.words)
        if len(set(self.layers)) != count or len(set(self.words)) != words:
            raise StoreError(
                f"layers and words must each be named once. Got {self.layers} and {self.words}. Drop the repeats."
            )
        object.__setattr__(self, "kinds", self.kinds or ("joint",) * count)
        _check_kinds(self.kinds, self.layers)
        for name, array in self.maps.items():
            _check_name("map direction", name, DIRECTIONS)
            _check_shape(f"maps {name}", array, (count, 1 if self.heads == "mean" else None, words, None, None, None))
        for name, array in self.metrics.items():
            _check_plain(name)
            _check_shape(f"metric {name}", array, (count, None))
        for name in self.metric_info:
            _check_name("metric with a definition", name, tuple(self.metrics))
        for name, array in self.regions.items():
            _check_name("region map", name, REGIONS)
            heads = 1 if self.region_facts.get(name, {}).get("heads") == "mean" else None
            _check_shape(f"region map {name}", array, (count, heads, None, None, None, None))
        _check_shape("mass", self.mass, (count, None, 3, 4))
        _check_shape("word_frames", self.word_frames, (count, None, words, None))
        _check_shape("frames", self.frames, (count, None, None, None))
        _check_shape("columns", self.columns, (count, None, None))
        _check_shape("token_mass", self.token_mass, (count, None, None))
        for name, kind in self.other_kinds.items():
            _check_name(f"kind of {name}", kind, KINDS)
        for layer, (query, key) in self.qk.items():
            _check_shape(f"query of layer {layer}", query, (None, None, None))
            _check_shape(f"key of layer {layer}", key, (None, None, None))


def _check_name(thing: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        listed = ", ".join(known) or "none"
        raise StoreError(f"{thing} must be one of {listed}. Got {value!r}. Use one of these.")


def _check_plain(name: str) -> None:
    if not name or "/" in name or name == ".":
        raise StoreError(f"metric names must be plain words. Got {name!r}. Leave out the slash.")


def _check_kinds(kinds: tuple[str, ...], layers: tuple[int, ...]) -> None:
    for kind in kinds:
        _check_name("kind of a layer", kind, KINDS)
    if len(kinds) != len(layers):
        raise StoreError(f"kinds must have one entry per layer. Got {kinds} for the layers {layers}. Name each one.")


def _check_shape(thing: str, array: np.ndarray | None, rule: tuple[int | None, ...]) -> None:
    if array is None:
        return
    shape = np.shape(array)
    if len(shape) != len(rule) or any(want not in (None, got) for want, got in zip(rule, shape, strict=True)):
        wanted = ", ".join("any" if want is None else str(want) for want in rule)
        raise StoreError(
            f"{thing} must have the shape [{wanted}]. Got {list(shape)}. Check the layers and words named."
        )


def _check_tokens(tokens: Mapping[str, Any]) -> None:
    if sorted(tokens) != sorted(TOKEN_FIELDS):
        raise StoreError(
            f"tokens must hold {', '.join(TOKEN_FIELDS)}. Got {', '.join(tokens) or 'nothing'}. Fill in all four."
        )
    lengths = {name: np.shape(values) for name, values in tokens.items()}
    if len(set(lengths.values())) != 1 or any(len(shape) != 1 for shape in lengths.values()):
        raise StoreError(f"token arrays must have one length. Got {lengths}. Give one entry per token.")
