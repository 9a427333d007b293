"""Opens run folders, read-only: numpy in and out, no torch.

    run = Run("runs/first")
    run.word_map("circle", layer=3, step=10)     # lift float32 [F, Y, X], 1.0 = uniform
    run.word_map("circle")                       # mean over every recorded step, layer and head

A run that is still being written can be read: each property looks at the folder again.
Shapes: L layers, H heads, W words, F token frames, Y rows and X columns of patches, N tokens.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import numpy as np

from probe import store_read as read
from probe.errors import StoreError
from probe.store_claim import refuse_taken
from probe.store_index import Source, check, mean_over
from probe.store_read import Place
from probe.store_record import SegmentRecord
from probe.store_region import RunRegions
from probe.store_row import Patch, attention_row
from probe.store_writer import RunWriter

__all__ = ["Run", "RunWriter", "SegmentRecord", "list_runs", "refuse_taken"]


class Run(RunRegions):
    """One run folder.

    In every reader, `step`, `layer` and `head` are numbers as the model counts them, and None is the mean over what was
    recorded; `segment` None is the first that has what is asked for; `role` None is, step by step, plain, else source,
    else target.
    Steps weigh the same in a mean, however many layers each recorded.

    Raises:
        StoreError: the folder is not a run of this project, or a file in it is damaged.
        UsageError: a reader was asked for something that was not recorded; the text lists what was.
    """

    def word_map(
        self,
        word: str,
        *,
        layer: int | None = None,
        step: int | None = None,
        head: int | None = None,
        segment: int | None = None,
        role: str | None = None,
        direction: str = "vt",
    ) -> np.ndarray:
        """Lift float32 [F, Y, X] of one word: how much more than uniform each patch looks at it.

        `direction` "vt": video rows, text columns; "vt_text": the same given the text; "tv": text rows, video columns;
        "mean": the mean of vt and tv.

        Raises:
            WordError: the word was not recorded.
        """
        places = self.index.places(segment, role, word)
        sources = self.index.sources(places, f"maps/{direction}", step, layer, head, word)

        def one(source: Source) -> np.ndarray:
            at = source.segment.words.index(word)
            return read.read_map(source.path, source.place, direction, source.layer, head, at)

        return mean_over(sources, one)

    def mass(
        self,
        *,
        step: int | None = None,
        layer: int | None = None,
        head: int | None = None,
        segment: int | None = None,
        role: str | None = None,
    ) -> np.ndarray:
        """Region mass float32 [3, 4], rows (text, padding, video) x columns (text, padding, same, other frames)."""
        return self._array("mass", step, layer, head, self.index.places(segment, role))

    def mass_grid(self, step: int, segment: int = 0, role: str | None = None) -> np.ndarray:
        """Region mass of every recorded layer and head of one step, float32 [L, H, 3, 4]."""
        (source,) = self.index.sources(self.index.places(segment, role), "mass", step)
        return read.read_array(source.path, source.place, "mass")

    def frames(
        self,
        *,
        step: int | None = None,
        layer: int | None = None,
        head: int | None = None,
        segment: int | None = None,
        role: str | None = None,
    ) -> np.ndarray:
        """Frame by frame attention float32 [F, C], rows look; C = F, or F + 1 with the text last."""
        return self._array("frames", step, layer, head, self.index.places(segment, role))

    def word_frames(
        self,
        word: str | None = None,
        *,
        step: int | None = None,
        layer: int | None = None,
        head: int | None = None,
        segment: int | None = None,
        role: str | None = None,
    ) -> np.ndarray:
        """What each frame gives to each word, float32 [W, F] in the order of `segment_words`; [F] for one word.

        Raises:
            WordError: the word was not recorded.
        """
        places = self.index.places(segment, role, word)
        sources = self.index.sources(places, "word_frames", step, layer, head, word)

        def one(source: Source) -> np.ndarray:
            found = _mean_part(source, "word_frames", head)
            return found if word is None else found[source.segment.words.index(word)]

        return mean_over(sources, one)

    def columns(
        self,
        *,
        step: int | None = None,
        layer: int | None = None,
        head: int | None = None,
        segment: int | None = None,
        role: str | None = None,
    ) -> np.ndarray:
        """Mean attention that each key receives, float32 [N] over the tokens of the attention, sums to 1."""
        return self._array("columns", step, layer, head, self.index.places(segment, role))

    def token_mass(
        self,
        *,
        step: int | None = None,
        layer: int | None = None,
        head: int | None = None,
        segment: int | None = None,
        role: str | None = None,
    ) -> np.ndarray:
        """Mean attention that the video rows give to each text token, float32 [T]."""
        return self._array("token_mass", step, layer, head, self.index.places(segment, role))

    def metric(
        self,
        name: str,
        *,
        step: int | None = None,
        layer: int | None = None,
        head: int | None = None,
        segment: int | None = None,
        role: str | None = None,
    ) -> float:
        """One metric, as defined in `metric_info`; means leave out what is NaN, and are NaN where all of it is."""
        sources = self.index.sources(self.index.places(segment, role), f"metrics/{name}", step, layer, head)
        parts = [read.read_part(at.path, at.place, f"metrics/{name}", at.layer, head) for at in sources]
        return _mean_defined(np.array([_mean_defined(part) for part in parts]))

    def metric_grid(self, name: str, step: int, segment: int = 0, role: str | None = None) -> np.ndarray:
        """One metric of every recorded layer and head of one step, float32 [L, H]; NaN where it is not defined."""
        (source,) = self.index.sources(self.index.places(segment, role), f"metrics/{name}", step)
        return read.read_array(source.path, source.place, f"metrics/{name}")

    def qk(
        self, layer: int, step: int, segment: int = 0, role: str | None = None, kind: str | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Query and key float16 [H, N, D] of one layer and step, after normalisation and rotation; see `qk_sites`.

        `kind` is the attention of a layer that has two, for example self or cross; None is the one that sees the text.
        """
        source, kind = self._kept(layer, step, segment, role, kind)
        name = source.segment.qk[layer][kind]
        query, key = (read.read_array(source.path, source.place, f"{name}/{one}") for one in "qk")
        return query, key

    def attention_row(
        self,
        layer: int,
        step: int,
        head: int | None = None,
        *,
        token: int | Patch,
        segment: int = 0,
        role: str | None = None,
        kind: str | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """What one token looks at, as probabilities that sum to 1: video float32 [F, Y, X] and text float32 [T].

        Computed from the query and key of a site of `qk_sites`. `token` is a patch (frame, row, column), or the number
        of a text token; `kind` is as in `qk`. The text is as long as its visible part; video and text stand as `order`
        of the segment says.
        """
        source, kind = self._kept(layer, step, segment, role, kind)
        if head is not None:
            heads = read.read_shape(source.path, source.place, f"{source.segment.qk[layer][kind]}/q")[0]
            check("head", head, range(heads))
        return attention_row(source.path, source.place, source.segment, layer, kind, head, token)

    def _kept(self, layer: int, step: int, segment: int, role: str | None, kind: str | None) -> tuple[Source, str]:
        """The file that holds query and key, and their kind."""
        head = self.index.head(step)
        there = [place for place in self.index.places(segment, role) if place in head.segments]
        check("layer of query and key", layer, head.segments[there[0]].qk if there else ())
        kept = head.segments[there[0]].qk[layer]
        kind = next(iter(kept)) if kind is None else kind
        check("kind of query and key", kind, kept)
        return Source(head.path, there[0], head.segments[there[0]], None), kind

    def _array(
        self, name: str, step: int | None, layer: int | None, head: int | None, places: tuple[Place, ...]
    ) -> np.ndarray:
        sources = self.index.sources(places, name, step, layer, head)
        return mean_over(sources, lambda source: _mean_part(source, name, head))


def list_runs(folder: str | os.PathLike[str]) -> list[Run]:
    """Return the runs in a folder, newest first; whatever is no run of this project is passed over.

    Raises:
        StoreError: the folder cannot be listed.
    """
    try:
        places = sorted(Path(folder).iterdir())
    except OSError as error:
        raise StoreError(f"folder of runs must be readable. Got '{error.strerror}' for {folder}. Check it.") from None
    runs = []
    for place in places:
        with contextlib.suppress(StoreError):
            runs.append((str((run := Run(place)).info.get("started", "")), run))
    return [run for _, run in sorted(runs, key=lambda pair: pair[0], reverse=True)]


def _mean_part(source: Source, name: str, head: int | None) -> np.ndarray:
    """The mean over the layers and heads asked for of an array [L, H, ...]."""
    part = read.read_part(source.path, source.place, name, source.layer, head)
    return part.mean((0, 1), dtype=np.float64)


def _mean_defined(values: np.ndarray) -> float:
    """Mean of what is not NaN; NaN where all is."""
    defined = values[~np.isnan(values)]
    return float(defined.mean(dtype=np.float64)) if defined.size else float("nan")
