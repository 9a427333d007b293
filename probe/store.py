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
from typing import Any

import numpy as np

from probe import store_read as read
from probe.errors import StoreError
from probe.folder import RECIPE, live_writer, read_info
from probe.store_index import Index, Source, check, mean_over, union
from probe.store_read import Place
from probe.store_record import SegmentRecord
from probe.store_writer import RunWriter, refuse_taken

__all__ = ["Run", "RunWriter", "SegmentRecord", "list_runs", "refuse_taken"]


class Run:
    """One run folder.

    In every reader, `step`, `layer` and `head` are numbers as the model counts them, and None is the mean over what was
    recorded; `segment` None is the first that has what is asked for; `role` None is, step by step, plain, else source,
    else target.
    Steps weigh the same in a mean, however many layers each recorded.

    Raises:
        StoreError: the folder is not a run of this project, or a file in it is damaged.
        UsageError: a reader was asked for something that was not recorded; the text lists what was.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._index = Index(self.path)
        read_info(self.path)

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}, status={self.status!r}, steps={len(self.steps)})"

    @property
    def info(self) -> dict[str, Any]:
        """run.json: status, times and provenance."""
        return read_info(self.path)

    @property
    def status(self) -> str:
        """running, done, failed or interrupted; a run whose writer died without a word is interrupted."""
        status = self.info["status"]
        if status == "running" and live_writer(self.path) is None:
            status = self.info["status"]  # the writer may have finished between the two looks
            return "interrupted" if status == "running" else status
        return status

    @property
    def recipe(self) -> str:
        """Text of recipe.yaml."""
        try:
            return (self.path / RECIPE).read_text(encoding="utf-8")
        except OSError as error:
            raise StoreError(f"{RECIPE} must be readable. Got '{error.strerror}' in {self.path}. Restore it.") from None

    @property
    def video(self) -> Path | None:
        """The video file, or None where none was written."""
        return next((path for name in ("video.mp4", "video.gif") if (path := self.path / name).is_file()), None)

    @property
    def steps(self) -> tuple[int, ...]:
        """The denoising steps whose file is there and opens."""
        return self._index.steps()

    @property
    def broken(self) -> tuple[Path, ...]:
        """Step files that cannot be opened; `steps` leaves them out."""
        return self._index.broken()

    @property
    def segments(self) -> tuple[Place, ...]:
        """(segment, role) of everything recorded."""
        return tuple(sorted({place for head in self._index.heads() for place in head.segments}))

    @property
    def words(self) -> tuple[str, ...]:
        """The recorded words, each once, in the order of the segments."""
        return union(segment.words for head in self._index.heads() for segment in head.segments.values())

    @property
    def layers(self) -> tuple[int, ...]:
        """The recorded layers, in order."""
        return tuple(
            sorted(union(segment.layers for head in self._index.heads() for segment in head.segments.values()))
        )

    def step_attrs(self, step: int) -> dict[str, Any]:
        """What the writer said about one step: timestep, sigma, model, dtype, backend."""
        return self._index.head(step).attrs

    def segment_attrs(self, segment: int = 0, role: str | None = None) -> dict[str, Any]:
        """What the writer said about a segment: start frame, grid, prompt, weight of the next prompt, guided."""
        place = self._index.places(segment, role)[0]
        return self._index.first(place).segments[place].attrs

    def segment_words(self, segment: int = 0, role: str | None = None) -> tuple[str, ...]:
        """The recorded words of one segment, in the order of the W axes."""
        place = self._index.places(segment, role)[0]
        return self._index.first(place).segments[place].words

    def tokens(self, segment: int = 0, role: str | None = None) -> dict[str, np.ndarray]:
        """Text tokens of a segment's prompt, arrays [N]: text, id, word, is_pad."""
        place = self._index.places(segment, role)[0]
        return read.read_tokens(self._index.first(place).path, place)

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

        `direction` "vt": video rows, text columns; "tv": text rows, video columns.

        Raises:
            WordError: the word was not recorded.
        """
        places = self._index.places(segment, role, word)
        sources = self._index.sources(places, f"maps/{direction}", step, layer, head, word)

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
        return self._array("mass", step, layer, head, self._index.places(segment, role))

    def mass_grid(self, step: int, segment: int = 0, role: str | None = None) -> np.ndarray:
        """Region mass of every recorded layer and head of one step, float32 [L, H, 3, 4]."""
        (source,) = self._index.sources(self._index.places(segment, role), "mass", step)
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
        return self._array("frames", step, layer, head, self._index.places(segment, role))

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
        places = self._index.places(segment, role, word)
        sources = self._index.sources(places, "word_frames", step, layer, head, word)

        def one(source: Source) -> np.ndarray:
            found = _select(read.read_array(source.path, source.place, "word_frames"), source.layer, head)
            return found if word is None else found[source.segment.words.index(word)]

        return mean_over(sources, one)

    def qk(self, layer: int, step: int, segment: int = 0, role: str | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Query and key float16 [H, N, D] of one layer and step, after normalisation and rotation."""
        head = self._index.head(step)
        there = [place for place in self._index.places(segment, role) if place in head.segments]
        kept = head.segments[there[0]].qk if there else ()
        check("layer of query and key", layer, kept)
        query, key = (read.read_array(head.path, there[0], f"qk/layer_{layer:02d}/{name}") for name in "qk")
        return query, key

    def resume(self) -> tuple[int, dict[str, Any]]:
        """The last complete step and the state a resumed run goes on from."""
        steps = self.steps
        if not steps or not self._index.head(steps[-1]).has_resume:
            last = f"step {steps[-1]} without one" if steps else "no complete step"
            raise StoreError(f"run must hold a resume state. Got {last} in {self.path}. Start it again.")
        return steps[-1], read.read_resume(self._index.head(steps[-1]).path)

    def _array(
        self, name: str, step: int | None, layer: int | None, head: int | None, places: tuple[Place, ...]
    ) -> np.ndarray:
        sources = self._index.sources(places, name, step, layer, head)
        return mean_over(sources, lambda at: _select(read.read_array(at.path, at.place, name), at.layer, head))


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


def _select(array: np.ndarray, layer: int | None, head: int | None) -> np.ndarray:
    """Take one layer and head of [L, H, ...], or their mean."""
    array = array if layer is None else array[layer : layer + 1]
    array = array if head is None else array[:, head : head + 1]
    return array.mean((0, 1), dtype=np.float64)
