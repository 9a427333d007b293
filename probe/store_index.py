"""What a run folder holds, step by step, and where a request for an array is answered from."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from probe.errors import UsageError, WordError
from probe.folder import step_files, step_path
from probe.site import ROLES
from probe.store_read import Place, SegmentHead, StepHead, opens, read_head

_THINGS = {"": "array", "maps": "map direction", "regions": "region map", "metrics": "metric"}


@dataclass(frozen=True)
class Source:
    """One step file that answers a request, and the layer's place on its L axis (None: all layers)."""

    path: Path
    place: Place
    segment: SegmentHead
    layer: int | None


class Index:
    """Heads of a folder's step files, read once each; a file that was replaced is read again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[Path, tuple[tuple[int, ...], StepHead]] = {}

    def steps(self) -> tuple[int, ...]:
        """The steps whose file opens."""
        return tuple(step for step, path in step_files(self._folder).items() if self._opens(path))

    def broken(self) -> tuple[Path, ...]:
        """The step files that do not open."""
        return tuple(path for path in step_files(self._folder).values() if not self._opens(path))

    def head(self, step: int) -> StepHead:
        """What one step holds.

        Raises:
            UsageError: there is no such step.
            StoreError: its file is damaged or foreign.
        """
        path = step_path(self._folder, step)
        if not self._is_known(path):
            paths = step_files(self._folder)
            check("step", step, paths)
            path = paths[step]
            self._known[path] = _stamp(path), read_head(path)
        return self._known[path][1]

    def heads(self) -> list[StepHead]:
        """What every step that opens holds."""
        return [self.head(step) for step in self.steps()]

    def places(self, segment: int | None, role: str | None, word: str | None = None) -> tuple[Place, ...]:
        """What a request means: one segment, the first that has the word, and its roles; plain, source, then target.

        A segment can be plain in one step and source or target in another: each step answers with the first it has.

        Raises:
            UsageError: the segment or role was not recorded.
            WordError: the word was not recorded there.
        """
        words: dict[Place, tuple[str, ...]] = {}
        for head in self.heads():
            for place, found in head.segments.items():
                words[place] = union([words.get(place, ()), found.words])
        if not words:
            raise UsageError("A run must have recorded attention to be read. Got none in its steps. Record it again.")
        if segment is not None:
            check("segment", segment, sorted({place[0] for place in words}))
            words = {place: names for place, names in words.items() if place[0] == segment}
        if role is not None:
            check("role", role, union([[place[1] for place in words]]))
            words = {place: names for place, names in words.items() if place[1] == role}
        if word is not None:
            having = [place for place, names in words.items() if word in names]
            check("word", word, union(words.values()), WordError)
            words = {place: words[place] for place in having}
        found = sorted(words, key=lambda place: (place[0], ROLES.index(place[1])))
        return tuple(place for place in found if place[0] == found[0][0])

    def first(self, place: Place) -> StepHead:
        """The first step that holds a segment and role."""
        return next(head for head in self.heads() if place in head.segments)

    def sources(
        self,
        wanted: tuple[Place, ...],
        name: str,
        step: int | None = None,
        layer: int | None = None,
        head: int | None = None,
        word: str | None = None,
    ) -> list[Source]:
        """Return the step files that hold array `name` of one of the places, for what else is asked for.

        Raises:
            UsageError: one of them was not recorded; the text lists what was.
            StoreError: the file of the step asked for is damaged.
        """
        if step is not None:
            self.head(step)  # says by itself what is wrong with a missing or damaged file
        chosen = {at: place for at in self.steps() if (place := self._first_of(wanted, at)) is not None}
        places = {at: self.head(at).segments[place] for at, place in chosen.items()}
        _check_name(name, union(found.heads for found in places.values()))
        places = {at: found for at, found in places.items() if name in found.heads and word in (None, *found.words)}
        if step is not None:
            check(f"step of {name}", step, places)
            places = {step: places[step]}
        if layer is not None:
            check("layer", layer, sorted(union(found.layers for found in places.values())))
            places = {at: found for at, found in places.items() if layer in found.layers}
        _check_head(name, head, places.values())
        return [
            Source(self.head(at).path, chosen[at], found, None if layer is None else found.layers.index(layer))
            for at, found in places.items()
        ]

    def _first_of(self, wanted: tuple[Place, ...], step: int) -> Place | None:
        segments = self.head(step).segments
        return next((place for place in wanted if place in segments), None)

    def _opens(self, path: Path) -> bool:
        return self._is_known(path) or opens(path)

    def _is_known(self, path: Path) -> bool:
        return path in self._known and self._known[path][0] == _stamp(path)


def _stamp(path: Path) -> tuple[int, ...]:
    """What changes when a file is replaced, also within one tick of the file system's clock; () when it is gone."""
    try:
        stat = path.stat()
    except OSError:
        return ()
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


def mean_over(sources: Iterable[Source], one: Callable[[Source], np.ndarray]) -> np.ndarray:
    """Return the mean of `one(source)`, summed as float64 and returned as float32."""
    return np.stack([one(source) for source in sources]).mean(0, dtype=np.float64).astype(np.float32)


def union(groups: Iterable[Iterable[Any]]) -> tuple[Any, ...]:
    """Return everything in the groups, each once, in order."""
    return tuple(dict.fromkeys(item for group in groups for item in group))


def check(thing: str, value: Any, known: Iterable[Any], error: type[UsageError] = UsageError) -> None:
    """Refuse a value that was not recorded, and list what was.

    Raises:
        UsageError: or the class given.
    """
    known = list(known)
    if value not in known:
        listed = ", ".join(str(item) for item in known) or "none"
        raise error(f"{thing} must be one that was recorded. Got {value!r}. Recorded: {listed}.")


def _check_name(name: str, known: Iterable[str]) -> None:
    group, slash, one = name.rpartition("/")
    names = [other.removeprefix(group + slash) for other in known if other.startswith(group + slash)]
    check(_THINGS[group], one, names)


def _check_head(name: str, head: int | None, found: Iterable[SegmentHead]) -> None:
    found = list(found)
    if head is None:
        return
    if any(segment.mean_heads(name) for segment in found):
        raise UsageError(
            f"head must be left out where maps hold the mean over heads. Got {head}. Record with heads='each'."
        )
    check("head", head, range(min(segment.heads[name] for segment in found)))
