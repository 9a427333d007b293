"""How the attention of two runs differs: tables for people, arrays for programs. No torch.

Only like is compared with like; what is left out is said. Differences are A - B.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from probe import mask, measure
from probe.contrast import Mode, correlation, difference, rank_heads
from probe.errors import UsageError, WordError
from probe.store import Run
from recipes import heatmap
from recipes.export import npz, write
from recipes.origin import unlike
from recipes.pair import Array, Pair, only

Metric = Literal["mass", "heads", "frames", "word"]
Row = dict[str, Any]

REGIONS = tuple(
    f"{rows} on {columns}"
    for rows in ("text", "padding", "video")
    for columns in ("text", "padding", "same frame", "other frames")
)
"""Names of the region masses [3, 4], flattened."""

FRAMES: dict[str, Callable[[Array], Any]] = {
    "self-frame mass": measure.self_frame_mass,
    "first-frame mass": measure.first_frame_mass,
    "causality": measure.causality,
    "decay per frame": lambda frames: measure.distance_decay(frames)[0],
    "text mass": lambda frames: measure.text_mass(frames) if frames.shape[0] < frames.shape[1] else np.nan,
}
"""What is told of a frame matrix [F, C]."""


@dataclass(frozen=True)
class Comparison:
    """Tables (rows with the same keys), the differences behind them as arrays, and what could not be compared."""

    tables: dict[str, list[Row]] = field(default_factory=dict)
    arrays: dict[str, Array] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()

    def __add__(self, other: Comparison) -> Comparison:
        names = dict.fromkeys((*self.tables, *other.tables))
        tables = {name: self.tables.get(name, []) + other.tables.get(name, []) for name in names}
        return Comparison(tables, self.arrays | other.arrays, self.left_out + other.left_out)


def compare(
    pair: Pair, word: str | None = None, metric: Metric | None = None, mode: Mode = "absolute", heads: int = 10
) -> Comparison:
    """What differs between two runs: in all that both have, in one `metric`, or in the maps of one `word`.

    `mode` as in `probe.contrast.difference`, for maps and heads; means over heads stay absolute where it is zscore. Up
    to `heads` heads are listed. The metric heads is every number per head that was recorded.

    Raises:
        UsageError: nothing is common, or a word is asked for that one of the runs does not have.
    """
    if word is not None and metric not in (None, "word"):
        raise UsageError(f"A word must be compared by the metric word. Got {metric}. Leave out --metric or --word.")
    parts = {
        "word": lambda: _words(pair, word, mode),
        "mass": lambda: _told("region masses", _masses, pair, mode, heads),
        "heads": lambda: _metrics(pair, mode),
        "frames": lambda: _told("frame matrices", _frames, pair, mode),
    }
    chosen = metric if word is None else "word"
    found = sum((part() for name, part in parts.items() if chosen in (None, name)), Comparison(left_out=pair.left_out))
    if not found.tables:
        raise UsageError(
            "Two runs must have something in common to be compared. Got nothing: "
            f"{'; '.join(line.rstrip('.') for line in found.left_out)}. See what they hold: mmdit maps RUN."
        )
    return Comparison({"what differs": unlike(pair.a, pair.b)}, {"layers": np.array(pair.layers)}) + found


def export(found: Comparison, kind: str | None, out: Path | None, stem: Path) -> Path:
    """Write the arrays as npz, or the tables as one csv with the name of the table in its first column.

    Raises:
        UsageError: see `recipes.export.write`.
        StoreError: the file cannot be written.
    """

    def table(path: Path) -> None:
        rows = [{"table": name, **row} for name, rows in found.tables.items() for row in rows]
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
            writer.writeheader()
            writer.writerows(rows)

    return write({"npz": lambda path: npz(path, found.arrays), "csv": table}, kind, out, stem)


def _words(pair: Pair, asked: str | None, mode: Mode) -> Comparison:
    a, b = ({word.casefold(): word for word in run.words} for run in (pair.a, pair.b))
    shared = {key: word for key, word in a.items() if key in b}
    if asked is not None and asked.casefold() not in shared:
        both = ", ".join(shared.values()) or "none"
        raise WordError(f"A word to compare must be recorded in both runs. Got {asked!r}. Both have: {both}.")
    found = Comparison(left_out=() if asked else only("words", a, b))
    failed: dict[str, list[str]] = {}
    for word in shared.values() if asked is None else [shared[asked.casefold()]]:
        try:
            found += _word(pair, word, mode)
        except UsageError as error:
            failed.setdefault(str(error), []).append(word)
    return found + Comparison(left_out=tuple(f"maps of {', '.join(of)}: {why}" for why, of in failed.items()))


def _word(pair: Pair, word: str, mode: Mode) -> Comparison:
    """One word's map (vt, mean over heads): how alike it is, and how alike it lies."""

    def one(run: Run, step: int | None, layer: int | None) -> Array:
        return heatmap.choose(run, word, layer, step, None, pair.segment, "vt").lift

    a, b = pair.read_layers(one)
    row = {
        "word": word,
        "correlation": _number(correlation(a, b)),
        "mean absolute difference": _number(np.abs(a - b).mean()),
        "iou of Otsu masks": _number(mask.iou(mask.otsu(a), mask.otsu(b))),
    }
    return Comparison({"words": [row]}, {f"word_{word}": difference(a, b, mode)})


def _masses(pair: Pair, mode: Mode, heads: int) -> Comparison:
    """Region masses, and the heads that differ most by them."""
    grids = pair.read_heads(lambda run, step: run.mass_grid(step, pair.segment or 0))
    a, b = (np.moveaxis(grid.reshape(*grid.shape[:2], len(REGIONS)), -1, 0) for grid in grids)
    means = zip(REGIONS, a.mean((1, 2)), b.mean((1, 2)), strict=True)
    rows = [_row("region", name, x, y, mode) for name, x, y in means if np.isfinite(x - y)]
    return Comparison({"region mass": rows}) + _heads(pair, a, b, mode, heads)


def _heads(pair: Pair, a: Array, b: Array, mode: Mode, count: int) -> Comparison:
    """The heads that differ most in any of the REGIONS [12, L, H], each with the one in which it does."""
    apart = np.stack([difference(x, y, mode) for x, y in zip(a, b, strict=True)])
    size = np.where(np.isnan(apart), 0, np.abs(apart))
    which, most = size.argmax(0), size.max(0)
    rows = []
    for one in rank_heads(np.where(most > 0, most, np.nan), count):
        at = int(which[one.layer, one.head]), one.layer, one.head
        place = {"layer": pair.layers[one.layer], "head": one.head, "region": REGIONS[at[0]]}
        rows.append(place | {"A": _number(a[at]), "B": _number(b[at]), _column(mode): _number(apart[at])})
    return Comparison({"heads by region mass": rows}, {"region_mass": np.moveaxis(apart, 0, -1)})


def _metrics(pair: Pair, mode: Mode) -> Comparison:
    """The numbers per head that both runs recorded."""
    a, b = (run.metrics for run in (pair.a, pair.b))
    found = (_told(name, _metric, pair, name, mode) for name in a if name in b)
    return sum(found, Comparison(left_out=only("metrics", a, b)))


def _metric(pair: Pair, name: str, mode: Mode) -> Comparison:
    """One number per head: its means, and the head in which it differs most."""
    a, b = pair.read_heads(lambda run, step: run.metric_grid(name, step, pair.segment or 0))
    apart, known = difference(a, b, mode), np.isfinite(a)
    if not known.any():
        raise UsageError("A metric must be defined in some head of both runs. Got none. Choose another step or layer.")
    (most,) = rank_heads(np.abs(apart), 1)
    place = {
        "most in layer": pair.layers[most.layer],
        "head": most.head,
        "there": _number(apart[most.layer, most.head]),
    }
    row = _row("metric", name, a[known].mean(), b[known].mean(), mode) | place
    return Comparison({"metrics": [row]}, {f"metric_{name}": apart})


def _frames(pair: Pair, mode: Mode) -> Comparison:
    """What frames give to each other, mean over heads."""
    a, b = pair.read_layers(lambda run, step, layer: run.frames(step=step, layer=layer, segment=pair.segment))
    rows = [_row("frames", name, tell(a), tell(b), mode) for name, tell in FRAMES.items()]
    return Comparison({"frames": [row for row in rows if row["A"] is not None]}, {"frames": difference(a, b, mode)})


def _told(what: str, part: Callable[..., Comparison], *given: Any) -> Comparison:
    """A part, or the reason why there is none."""
    try:
        return part(*given)
    except UsageError as error:
        return Comparison(left_out=(f"{what}: {error}",))


def _row(column: str, name: str, a: Any, b: Any, mode: Mode) -> Row:
    mode = "absolute" if mode == "zscore" else mode
    apart = difference(a, b, mode)
    return {column: name, "A": _number(a), "B": _number(b), _column(mode): _number(apart)}


def _column(mode: Mode) -> str:
    return {"absolute": "A - B", "relative": "relative difference", "zscore": "z of A - B"}[mode]


def _number(value: Any) -> float | None:
    """Four digits; None for what is not defined."""
    return float(f"{float(value):.4g}") + 0.0 if np.isfinite(value) else None
