"""How many bytes a run folder will take, told before anything runs. Plain numbers: no numpy, no HDF5."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

CODE = 0.895
"""Bytes per map value after gzip where the log of lift is white noise of any size; smooth maps take less."""

_FILE, _SEGMENT, _TOKEN, _TABLE, _MAPS, _CHUNK = 5_500, 12_500, 55, 700, 7_000, 200  # HDF5 and gzip add


@dataclass(frozen=True)
class Selection:
    """What a run keeps. Everything but the maps is counted as float32 (query and key: float16) before gzip.

    Attributes:
        steps, layers, heads: how many are recorded; metrics, masses, columns and frames keep each head.
        region_steps: how many steps have region maps.
        grid: token frames, rows and columns of patches of one segment.
        text: text tokens, padding included.
        words: words with maps.
        map_heads: heads of the maps, of region maps too; 1 for their mean.
        directions: 2 for vt and tv.
        mass, word_frames, frames, columns, token_mass, text_text, spatial, temporal: whether they are kept.
        metrics: number of metrics.
        qk: number of (step, layer) whose query and key are kept.
        width: head width of query and key.
        state: values of the one state to resume from, kept as float32: latents, and as many for x0 with DPM.
        segments: segments and roles recorded in a step, on average.
    """

    steps: int
    layers: int
    heads: int
    grid: tuple[int, int, int]
    text: int
    words: int = 0
    map_heads: int = 1
    directions: int = 2
    mass: bool = True
    word_frames: bool = True
    frames: bool = False
    columns: bool = False
    token_mass: bool = False
    text_text: bool = False
    spatial: bool = False
    temporal: bool = False
    region_steps: int = 0
    metrics: int = 0
    qk: int = 0
    width: int = 64
    state: int = 0
    segments: float = 1


def predicted_bytes(selection: Selection) -> int:
    """Bytes of the step files and resume.h5 together; the video and its pictures come on top.

    It is what a run takes whose maps are the hardest that gzip meets in attention, white noise in the log of lift. A
    real run takes less. Only maps whose codes are all equally frequent would take more, by 1 / CODE.
    """
    one = selection
    video = prod(one.grid)
    tables = (
        12 * one.mass,
        one.words * one.grid[0] * one.word_frames,
        one.grid[0] * (one.grid[0] + 1) * one.frames,
        (one.text + video) * one.columns,
        one.text * one.token_mass,
        *(one.metrics * [1]),
    )
    floats = sum(4 * one.layers * one.heads * size + _TABLE for size in tables if size)
    chunks = one.layers * one.map_heads * one.words
    maps = one.directions * (chunks * (CODE * video + _CHUNK + 8) + _MAPS) if chunks else 0
    segment = _SEGMENT + _TOKEN * one.text + floats + maps
    kinds = one.text_text + one.spatial + one.temporal
    regions = one.segments * (one.layers * one.map_heads * _region_bytes(one) + _MAPS * kinds)
    kept = 4 * one.heads * (one.text + video) * one.width + _TABLE
    steps = one.steps * (_FILE + one.segments * segment) + one.region_steps * regions
    return round(steps + one.qk * kept + _FILE + 4 * one.state)


def _region_bytes(one: Selection) -> float:
    """Of the region maps of one layer and head: a byte per code, for rows are short and their codes even, and two
    float32 per row.
    """
    frames, patches = one.grid[0], one.grid[1] * one.grid[2]
    rows = {"text_text": (one.text, one.text), "spatial": (patches, patches), "temporal": (frames, frames * patches)}
    return sum(looking * (seen + 8) + _CHUNK for name, (looking, seen) in rows.items() if getattr(one, name))
