"""The region maps of a run: parts of its attention matrix, as `probe.readout.region_map` recorded them. numpy only."""

from __future__ import annotations

from functools import reduce

import numpy as np

from probe import store_read as read
from probe.errors import UsageError
from probe.store_contents import RunFolder
from probe.store_record import REGIONS


class RunRegions(RunFolder):
    """A run folder with its region maps; probabilities of the softmax over all keys."""

    def text_text(
        self,
        *,
        step: int | None = None,
        layer: int | None = None,
        head: int | None = None,
        segment: int | None = None,
        role: str | None = None,
    ) -> np.ndarray:
        """What each text token gives to each text token, float32 [T, T], rows look."""
        found = self._region("text_text", step, layer, head, segment, role)
        return found.reshape(len(found), -1)

    def spatial(
        self,
        *,
        step: int | None = None,
        layer: int | None = None,
        head: int | None = None,
        segment: int | None = None,
        role: str | None = None,
    ) -> np.ndarray:
        """What each patch of one frame gives to each patch of it, float32 [Y X, Y, X]; the frame is `spatial_frame`."""
        return self._region("spatial", step, layer, head, segment, role)[:, 0]

    def temporal(
        self,
        patch: tuple[int, int],
        *,
        step: int | None = None,
        layer: int | None = None,
        head: int | None = None,
        segment: int | None = None,
        role: str | None = None,
    ) -> np.ndarray:
        """What the patch at (row, column) gives to itself from frame to frame, float32 [F, F], rows look.

        Raises:
            UsageError: the grid has no such patch.
        """
        found = self._region("temporal", step, layer, head, segment, role)
        height, width = found.shape[2:]
        if len(patch) != 2 or not (0 <= patch[0] < height and 0 <= patch[1] < width):
            raise UsageError(
                f"A patch must be (row, column) in the grid {height}x{width}. Got {tuple(patch)}. Count each from 0."
            )
        return found[:, :, patch[0], patch[1]]

    def spatial_frame(self, segment: int | None = None, role: str | None = None) -> int:
        """The token frame of the spatial map."""
        (source, *_) = self.index.sources(self.index.places(segment, role), "regions/spatial")
        return int(source.segment.regions["spatial"]["frame"])

    def region_maps(self, segment: int | None = None, role: str | None = None) -> dict[str, tuple[int, ...]]:
        """The steps of each region map that was recorded of a segment, by its name."""
        places, found = self.index.places(segment, role), {name: dict[int, None]() for name in REGIONS}
        for head in self.index.heads():
            for place in places:
                for name in head.segments[place].regions if place in head.segments else ():
                    found[name][int(head.attrs["step"])] = None
        return {name: tuple(steps) for name, steps in found.items() if steps}

    def _region(
        self, name: str, step: int | None, layer: int | None, head: int | None, segment: int | None, role: str | None
    ) -> np.ndarray:
        sources = self.index.sources(self.index.places(segment, role), f"regions/{name}", step, layer, head)
        parts = (read.read_region(at.path, at.place, name, at.layer, head) for at in sources)
        return (reduce(np.add, parts) / len(sources)).astype(np.float32)
