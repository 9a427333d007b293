"""Masks of words: cut from a run's maps, measured, and kept as files. No torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from probe import mask
from probe.errors import LayoutError, StoreError
from probe.store import Run
from recipes.export import Writer, npz, write
from recipes.heatmap import Picked, pictures


@dataclass(frozen=True)
class Rule:
    """How a word map becomes a mask; the fields are those of `probe.mask.extract`, `largest` is its `component`."""

    method: mask.Method = "otsu"
    value: float | None = None
    smooth: float = 0.0
    per: mask.Per = "clip"
    largest: bool = False

    def __str__(self) -> str:
        parts = [self.method if self.value is None else f"{self.method} {self.value:g}", f"per {self.per}"]
        parts += [f"smooth {self.smooth:g}"] if self.smooth else []
        return ", ".join(parts + (["largest part"] if self.largest else []))

    def cut(self, lift: NDArray[np.floating]) -> mask.Mask:
        """The mask, bool [F, Y, X]. Frames that do not have the word (lift 0 everywhere) stay empty and out of the
        threshold.

        Raises:
            UsageError: a value is missing or too many.
        """
        found, shown = np.zeros(lift.shape, bool), lift.any((1, 2))
        if shown.any():
            found[shown] = mask.extract(lift[shown], self.method, self.value, self.smooth, self.per)
        return mask.largest_component(found) if self.largest else found


def summary(found: mask.Mask, picked: Picked, rule: Rule) -> dict[str, Any]:
    """Share of the patches inside, and how much of each frame stays inside in the next."""
    return {
        "mask": _title(picked, rule),
        "shape": "x".join(str(n) for n in found.shape),
        "share": _short(found.mean()),
        "share per frame": _short(found.mean((1, 2))),
        "temporal iou": _short(mask.temporal_iou(found)),
    }


def agreement(found: mask.Mask, other: mask.Mask, name: str) -> dict[str, Any]:
    """IoU with another mask.

    Raises:
        LayoutError: it lies on another grid.
    """
    return {
        "against": name,
        "iou": _short(mask.iou(found, other)),
        "iou per frame": _short(mask.iou_per_frame(found, other)),
    }


def export(run: Run, picked: Picked, rule: Rule, found: mask.Mask, kind: str | None, out: Path | None) -> Path:
    """Write a mask as npz (`mask`, bool [F, Y, X]), png (contact sheet), gif or mp4 (over the frames).

    Raises:
        UsageError: pictures are asked for and the run has no video; see also `recipes.export.write`.
        StoreError: the file cannot be written.
    """
    title = _title(picked, rule)
    drawn = replace(picked, lift=found.astype(np.float32))
    writers: dict[str, Writer] = {
        "npz": lambda path: npz(path, {"mask": found, "title": np.array(title)}),
        **pictures(run, drawn, title, opacity=0.6),
    }
    return write(writers, kind, out, run.path / f"{picked.word.replace(' ', '_')}_{picked.direction}_mask")


def load(path: Path) -> mask.Mask:
    """The mask of an npz file, bool [F, Y, X].

    Raises:
        StoreError: the file cannot be read, or has no `mask`.
        LayoutError: its mask is not one.
    """
    try:
        with np.load(path) as file:
            names = list(file)
            found = file["mask"] if "mask" in names else None
    except (OSError, ValueError, EOFError, BadZipFile, TypeError) as error:
        raise StoreError(
            f"A mask must be a readable npz file. Got {path}: {' '.join(str(error).split())}. Write one with "
            "mmdit mask RUN --word W --export npz."
        ) from error
    if found is None:
        raise StoreError(
            f"A mask file must hold an array named mask. Got {', '.join(names) or 'no array'} in {path}. Rename it."
        )
    if found.ndim != 3 or not found.size or not np.isin(found, (0, 1)).all():
        raise LayoutError(
            f"A mask must be bool, frames x rows x columns. Got {found.dtype} {found.shape} in {path}. Cut it first."
        )
    return found.astype(bool)


def _title(picked: Picked, rule: Rule) -> str:
    return f"{picked.title} · {rule}"


def _short(values: Any) -> Any:
    """Four decimals; None for what is not defined."""
    if np.ndim(values):
        return [_short(value) for value in values]
    return None if np.isnan(values) else round(float(values), 4)
