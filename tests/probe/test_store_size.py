"""The size that is told before a run is the size that is found after it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from probe.store import RunWriter, SegmentRecord
from probe.store_size import CODE, Selection, predicted_bytes

SMALL = Selection(steps=2, layers=2, heads=3, grid=(13, 30, 45), text=226, words=2, state=5_000)
COGVIDEOX_2B = Selection(
    steps=50,
    layers=30,
    heads=30,
    grid=(13, 30, 45),
    text=226,
    words=16,
    frames=True,
    qk=1,
    width=64,
    state=2 * 13 * 16 * 60 * 90,  # latents and x0
)


def white(rng, shape):
    """Lift whose logarithm is white noise: nothing for gzip to find but the bell of its histogram."""
    return np.exp2(rng.normal(0, 1.5, shape)).astype(np.float32)


def smooth(rng, shape):
    """Lift that is a wave over the patches, of another length in each map."""
    place = np.linspace(0, 1, shape[-1]) + np.linspace(0, 1, shape[-2])[:, None]
    waves = rng.uniform(3, 6, (*shape[:3], 1, 1, 1)) * place + rng.normal(0, 1, (*shape[:4], 1, 1))
    return np.exp2(3 * np.sin(waves)).astype(np.float32)


def made(selection: Selection, segment: int, step: int, maps) -> SegmentRecord:
    """A record of just what was selected."""
    s, rng = selection, np.random.default_rng(100 * step + segment)
    table = (s.layers, s.heads)
    frames, total = s.grid[0], s.text + int(np.prod(s.grid))

    def floats(kept, *shape):
        return rng.random((*table, *shape)).astype(np.float32) if kept else None

    pair = tuple(rng.normal(size=(s.heads, total, s.width)).astype(np.float16) for _ in "qk")
    numbers = np.arange(s.text)
    return SegmentRecord(
        segment=segment,
        role="plain",
        attrs={"grid": list(s.grid), "order": "text-video", "prompt": "a red circle " * 20},
        tokens={"text": [f"▁{i}" for i in numbers], "id": numbers, "word": numbers, "is_pad": numbers > 20},
        words=tuple(f"word {i}" for i in range(s.words)),
        layers=tuple(range(s.layers)),
        mass=floats(s.mass, 3, 4),
        maps={
            d: maps(rng, (s.layers, s.map_heads, s.words, *s.grid))
            for d in ("vt", "tv")[: s.directions * (s.words > 0)]
        },
        heads="mean" if s.map_heads == 1 else "each",
        word_frames=floats(s.word_frames and s.words, s.words, frames),
        frames=floats(s.frames, frames, frames + 1),
        columns=floats(s.columns, total),
        token_mass=floats(s.token_mass, s.text),
        metrics={f"metric {i}": rng.random(table) for i in range(s.metrics)},
        metric_info={f"metric {i}": "what it is, its range and its unit" for i in range(s.metrics)},
        qk={0: pair} if step < s.qk else {},
        regions=regions(s, maps, rng) if step < s.region_steps else {},
    )


def regions(selection: Selection, maps, rng) -> dict[str, np.ndarray]:
    """Region maps of a record, as lift over 2**16."""
    s, (frames, height, width) = selection, selection.grid
    shapes = {
        "text_text": (s.text, 1, 1, s.text),
        "spatial": (height * width, 1, height, width),
        "temporal": (frames, frames, height, width),
    }
    kept = {name: shape for name, shape in shapes.items() if getattr(s, name)}
    return {name: maps(rng, (s.layers, s.map_heads, *shape)) / 2**16 for name, shape in kept.items()}


def found_bytes(selection, folder, maps=white):
    """What such a run takes on disk, without run.json and the recipe."""
    with RunWriter.create(folder, {}, "") as writer:
        for step in range(selection.steps):
            records = [made(selection, number, step, maps) for number in range(int(selection.segments))]
            state = {"latents": np.random.default_rng(step).random(selection.state).astype(np.float32)}
            writer.write_step(step, {"timestep": 999 - step}, records, state)
    return sum(path.stat().st_size for path in folder.rglob("*.h5"))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"map_heads": 3},
        {"directions": 1, "words": 5},
        {"frames": True, "token_mass": True, "metrics": 12},
        {"qk": 1},
        {"segments": 3},
        {"layers": 9, "state": 200_000},
    ],
)
def test_the_prediction_is_what_white_noise_takes(tmp_path, changes):
    selection = replace(SMALL, **changes)
    share = found_bytes(selection, tmp_path / "run") / predicted_bytes(selection)
    assert 0.94 < share <= 1, share


@pytest.mark.parametrize(
    "changes",
    [
        {"text_text": True, "region_steps": 1},
        {"spatial": True, "temporal": True, "region_steps": 1, "grid": (5, 10, 12), "map_heads": 3},
        {"spatial": True, "temporal": True, "region_steps": 2, "segments": 2, "grid": (5, 10, 12), "words": 0},
    ],
)
def test_region_maps_are_counted_as_a_byte_per_value(tmp_path, changes):
    selection = replace(SMALL, **changes)
    assert 0.88 < found_bytes(selection, tmp_path / "run") / predicted_bytes(selection) <= 1


def test_a_prediction_for_a_toy_is_not_too_small(tmp_path):
    """gzip gains nothing on 320 values, and HDF5 adds as much as they take."""
    selection = replace(SMALL, grid=(5, 8, 8), text=20, words=20, layers=6)
    assert 0.8 < found_bytes(selection, tmp_path / "run") / predicted_bytes(selection) <= 1


@pytest.mark.parametrize(("changes", "maps"), [({"words": 8}, smooth), ({"words": 0, "columns": True}, white)])
def test_smooth_maps_and_large_tables_take_less(tmp_path, changes, maps):
    """Tables are counted before gzip."""
    selection = replace(SMALL, **changes)
    assert found_bytes(selection, tmp_path / "run", maps) < 0.88 * predicted_bytes(selection)


def test_the_state_is_kept_once_however_many_steps():
    grows = predicted_bytes(replace(SMALL, state=10_000_000)) - predicted_bytes(replace(SMALL, state=0))
    assert grows == 40_000_000
    assert predicted_bytes(replace(SMALL, steps=4, state=0)) < 2 * predicted_bytes(replace(SMALL, state=0))


def test_a_run_of_cogvideox_2b_stays_under_a_gigabyte():
    maps = 50 * 30 * 16 * 2 * 13 * 30 * 45 * CODE
    tables = 50 * 30 * 30 * 4 * (12 + 16 * 13 + 13 * 14)
    pair, state = 2 * 30 * (226 + 17_550) * 64 * 2, 4 * 2 * 13 * 16 * 60 * 90
    total = predicted_bytes(COGVIDEOX_2B)
    assert total < 1e9
    assert 1 < total / (maps + tables + pair + state) < 1.02
