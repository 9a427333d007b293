"""The figure of words: where the video looks at each of them, frame by frame. No torch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from PIL import Image

from probe import film
from probe.errors import LayoutError
from recipes import heatmap
from recipes.draw import MAGMA, tiles
from recipes.figure import Ends, Kind, Values, extremes

_MOST = 9  # frames side by side
_TILE = 112  # pixels of their height


class TokensFigure(Kind):
    """Where the video looks at each word."""

    @property
    def name(self) -> str:
        return "tokens" if self.choice.word_frame is None else f"tokens_frame_{self.choice.word_frame}"

    def read(self, layer: int | None) -> Values:
        """Lift [W, F, Y, X].

        Raises:
            LayoutError: the video has no such frame.
        """
        frame, frames = self.choice.word_frame, self.grid[0]
        if frame is not None and not 0 <= frame < frames:
            raise LayoutError(
                f"A frame must lie in 0 to {frames - 1}. Got {frame}. Count token frames, not pixel frames."
            )
        return np.stack([self.run.word_map(word, layer=layer, **self.at) for word in self._words])

    def draw(self, values: Values, notes: list[str], ends: Ends) -> Image.Image:
        """One row per word, below the frames of the video."""
        shown, own = self._frames(values.shape[1]), self.choice.scaling == "minmax"
        legend = replace(self.legend(values, ends, "lift, 1 = uniform"), colours=MAGMA)
        if own:
            legend = replace(legend, unit="lift, each frame by itself", ends=("lowest", "highest"))
        rows = {"frame": self._pixels(shown)} if self.run.video else {}
        for word, lift in zip(self._words, values, strict=True):
            legends = [replace(legend, scale=extremes(lift[frame])) if own else legend for frame in shown]
            rows[word] = [self._tile(one.paint(lift[frame])) for one, frame in zip(legends, shown, strict=True)]
        columns = [f"token frame {frame}" for frame in shown]
        return tiles("Where the video looks at each word", notes, rows, columns, legend)

    @property
    def _words(self) -> tuple[str, ...]:
        return self.run.segment_words(self.segment)[: self.choice.words]

    def _frames(self, count: int) -> list[int]:
        if self.choice.word_frame is not None:
            return [self.choice.word_frame]
        return [int(at) for at in np.unique(np.linspace(0, count - 1, min(count, _MOST)).round())]

    def _tile(self, picture: film.Frames) -> film.Frames:
        zoom = max(1, round(_TILE / self.grid[1]))
        return picture.repeat(zoom, 0).repeat(zoom, 1)

    def _pixels(self, shown: list[int]) -> list[film.Frames]:
        """The pixel frame in the middle of each token frame, at the size of a tile."""
        found = heatmap.frames_of_segment(self.run, self.segment, self.grid[0])
        height, width = self._tile(np.zeros((*self.grid[1:], 3), np.uint8)).shape[:2]
        return [
            np.asarray(Image.fromarray(found[frame]).resize((width, height), Image.Resampling.LANCZOS))
            for frame in shown
        ]
