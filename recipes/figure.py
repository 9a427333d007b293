"""Kinds of figures of a run's attention: how each is read, and how it is drawn. No torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from probe.errors import UsageError
from probe.store import Run
from recipes.draw import Axis, Legend, Scale, matrix

Scaling = Literal["minmax", "fixed", "log"]
Layers = tuple[int, ...] | None
"""The layers whose mean is drawn; None is every recorded one."""

Values = NDArray[np.float32]
Ends = tuple[float, float]

_LABELLED = 128  # tokens whose texts are written


@dataclass(frozen=True)
class Choice:
    """What is drawn. None is everything recorded, the mean of all steps and of all heads, the first segment, every
    frame of the word maps, the middle patch, every word.

    `frame` is that of the spatial map, which was chosen when it was recorded; `word_frame` that of the word maps.
    `scaling` says what the first and last colour are: minmax the smallest and largest value of a picture, of word maps
    of each frame; fixed zero and the largest value in all figures of a kind; log the smallest, at most four decades
    below, and the largest of them, with colours spaced by the logarithm. `padding` keeps the padding of the text.
    """

    what: tuple[str, ...] | None = None
    layers: tuple[Layers, ...] = (None,)
    step: int | None = None
    head: int | None = None
    segment: int | None = None
    frame: int | None = None
    word_frame: int | None = None
    patch: tuple[int, int] | None = None
    words: int | None = None
    scaling: Scaling = "minmax"
    padding: bool = False


@dataclass(frozen=True)
class Kind(ABC):
    """One kind of figure of one segment of a run."""

    run: Run
    choice: Choice
    segment: int
    steps: tuple[int, ...]
    """Those that hold it."""

    @abstractmethod
    def read(self, layer: int | None) -> Values:
        """The numbers of one layer, or of the mean of all."""

    @abstractmethod
    def draw(self, values: Values, notes: list[str], ends: Ends) -> Image.Image:
        """The picture; `ends` are the smallest and largest value in all figures of this kind."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What it shows, as a part of a file name."""

    @property
    def at(self) -> dict[str, Any]:
        """Where the readers of a run look, but for the layer."""
        return {"step": self.choice.step, "head": self.choice.head, "segment": self.segment}

    @property
    def grid(self) -> tuple[int, int, int]:
        """Token frames, rows and columns of patches."""
        frames, height, width = self.run.segment_attrs(self.segment)["grid"]
        return frames, height, width

    def legend(self, values: Values, ends: Ends, unit: str = "probability") -> Legend:
        """Colours by the choice of their scale."""
        if self.choice.scaling == "minmax":
            return Legend(extremes(values), unit)
        log = self.choice.scaling == "log"
        return Legend(Scale(ends[0] if log else 0, ends[1], log), unit)


class TextFigure(Kind):
    """What text tokens give to text tokens."""

    @property
    def name(self) -> str:
        return "text"

    def read(self, layer: int | None) -> Values:
        """[T, T], without the padding unless it is asked for."""
        found = self.run.text_text(layer=layer, **self.at)
        kept = self._kept(len(found))
        return found[np.ix_(kept, kept)]

    def draw(self, values: Values, notes: list[str], ends: Ends) -> Image.Image:
        labels = self.labels(len(values))
        sides = Axis("token that looks", labels), Axis("token looked at", labels)
        return matrix("Text to text", notes, values, sides, self.legend(values, ends))

    def _kept(self, count: int) -> NDArray[np.intp]:
        """Positions of the tokens that are drawn."""
        pads = self.run.tokens(self.segment)["is_pad"][:count]
        return np.arange(count) if self.choice.padding or len(pads) < count else np.flatnonzero(~pads)

    def labels(self, count: int) -> dict[int, str]:
        """Texts of the tokens, those that go on with a word behind a hyphen; numbers where there are too many."""
        tokens = self.run.tokens(self.segment)
        if count > _LABELLED or len(tokens["text"]) < count:
            return {at: str(at) for at in range(0, count, 20)}
        words, kept = tokens["word"], self._kept(len(tokens["text"]))[:count]
        inner = [at > 0 and words[at] == words[at - 1] >= 0 for at in kept]
        return {i: _shown(str(tokens["text"][at]), inner[i], at) for i, at in enumerate(kept)}


class SpatialFigure(Kind):
    """What the patches of one frame give to each other."""

    @property
    def name(self) -> str:
        return f"spatial_frame_{self._frame}"

    def read(self, layer: int | None) -> Values:
        """[Y X, Y X].

        Raises:
            UsageError: another frame is asked for than was recorded.
        """
        if self.choice.frame not in (None, self._frame):
            raise UsageError(
                f"The frame of a spatial map must be the recorded one, {self._frame}. Got {self.choice.frame}. Leave "
                "out --frame, or record it with --set record.region_frame."
            )
        found = self.run.spatial(layer=layer, **self.at)
        return found.reshape(len(found), -1)

    def draw(self, values: Values, notes: list[str], ends: Ends) -> Image.Image:
        _, height, width = self.grid
        every = max(1, -(-22 * height // 900))  # rows from one label to the next, 22 pixels or more
        labels = {row * width + width // 2: str(row) for row in range(0, height, every)}
        names = "patch that looks, by row of the frame", "patch looked at, by row of the frame"
        sides = Axis(names[0], labels, width), Axis(names[1], labels, width)
        title = f"Patch to patch in token frame {self._frame}"
        return matrix(title, notes, values, sides, self.legend(values, ends))

    @property
    def _frame(self) -> int:
        return self.run.spatial_frame(self.segment)


class TemporalFigure(Kind):
    """What one patch gives to itself over the frames."""

    @property
    def name(self) -> str:
        return f"temporal_patch_{self._patch[0]}_{self._patch[1]}"

    def read(self, layer: int | None) -> Values:
        """[F, F]."""
        return self.run.temporal(self._patch, layer=layer, **self.at)

    def draw(self, values: Values, notes: list[str], ends: Ends) -> Image.Image:
        labels = {frame: str(frame) for frame in range(len(values))}
        sides = Axis("token frame that looks", labels), Axis("token frame looked at", labels)
        title = f"Frame to frame at patch {self._patch[0]}, {self._patch[1]}"
        return matrix(title, notes, values, sides, self.legend(values, ends))

    @property
    def _patch(self) -> tuple[int, int]:
        """The chosen patch, else the middle one."""
        _, height, width = self.grid
        return self.choice.patch or (height // 2, width // 2)


def extremes(values: Values) -> Scale:
    """From the smallest to the largest value."""
    return Scale(float(values.min()), float(values.max()))


def _shown(piece: str, inner: bool, at: int) -> str:
    """The text of a token as people write it; its number where the font has no such letters."""
    plain = piece.replace("▁", "").replace("Ġ", "").replace("</w>", "") or "space"
    if any(ord(letter) > 0x24F for letter in plain):
        return f"token {at}"
    return f"-{plain}" if inner else plain
