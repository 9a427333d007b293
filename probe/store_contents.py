"""What a run folder says about itself and what it holds; the arrays are read by `probe.store`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from probe import store_read as read
from probe.errors import StoreError
from probe.folder import RECIPE, RESUME, live_writer, read_info
from probe.store_index import Index, union
from probe.store_read import Place, SegmentHead
from probe.store_resume import AGAIN, read_resume


class RunFolder:
    """A run folder without its arrays; each property looks at the folder again.

    `index` finds the step files that answer a request.

    Raises:
        StoreError: the folder is not a run of this project, or a file in it is damaged.
        UsageError: something was asked for that was not recorded; the text lists what was.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.index = Index(self.path)
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
        return self.index.steps()

    @property
    def broken(self) -> tuple[Path, ...]:
        """Step files that cannot be opened; `steps` leaves them out."""
        return self.index.broken()

    @property
    def segments(self) -> tuple[Place, ...]:
        """(segment, role) of everything recorded."""
        return tuple(sorted({place for head in self.index.heads() for place in head.segments}))

    @property
    def words(self) -> tuple[str, ...]:
        """The recorded words, each once, in the order of the segments."""
        return union(segment.words for segment in self._recorded())

    @property
    def layers(self) -> tuple[int, ...]:
        """The recorded layers, in order."""
        return tuple(sorted(union(segment.layers for segment in self._recorded())))

    @property
    def layer_kinds(self) -> dict[int, str]:
        """Attention of each recorded layer, in order: joint, double, single, self or cross."""
        kinds = {layer: kind for one in self._recorded() for layer, kind in zip(one.layers, one.kinds, strict=True)}
        return dict(sorted(kinds.items()))

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the recorded metrics, each once."""
        return union(segment.metrics for segment in self._recorded())

    @property
    def metric_info(self) -> dict[str, str]:
        """Definition of each recorded metric, by its name; empty where the writer gave none."""
        return {name: said for segment in self._recorded() for name, said in segment.metrics.items()}

    @property
    def qk_sites(self) -> tuple[tuple[int, int], ...]:
        """(step, layer) of every query and key that was kept."""
        heads = self.index.heads()
        return tuple(
            sorted({(int(h.attrs["step"]), at) for h in heads for one in h.segments.values() for at in one.qk})
        )

    @property
    def has_state(self) -> bool:
        """Whether there is a state to resume from; none before the first step is finished."""
        return (self.path / RESUME).is_file()

    def step_attrs(self, step: int) -> dict[str, Any]:
        """What the writer said about one step: timestep, sigma, model, dtype, backend."""
        return self.index.head(step).attrs

    def segment_attrs(self, segment: int = 0, role: str | None = None) -> dict[str, Any]:
        """What the writer said about a segment: start frame, grid, prompt, weight of the next prompt, guided."""
        place = self.index.places(segment, role)[0]
        return self.index.first(place).segments[place].attrs

    def segment_words(self, segment: int = 0, role: str | None = None) -> tuple[str, ...]:
        """The recorded words of one segment, in the order of the W axes."""
        place = self.index.places(segment, role)[0]
        return self.index.first(place).segments[place].words

    def tokens(self, segment: int = 0, role: str | None = None) -> dict[str, np.ndarray]:
        """Text tokens of a segment's prompt, arrays [T]: text, id, word, is_pad."""
        place = self.index.places(segment, role)[0]
        return read.read_tokens(self.index.first(place).path, place)

    def resume(self) -> tuple[int, dict[str, Any]]:
        """The newest finished step from which a resumed run goes on, and its state.

        A run killed between a step file and its state gives the state before: that step is computed again.

        Raises:
            StoreError: resume.h5 is absent, damaged, of another schema, or its step has no whole file.
        """
        step, state = read_resume(self.path / RESUME)
        if step not in (steps := self.steps):
            listed = ", ".join(map(str, steps)) or "none"
            raise StoreError(
                f"resume state must follow a step whose file is whole. Got step {step} in {self.path}, which has "
                f"{listed}. {AGAIN}"
            )
        return step, state

    def _recorded(self) -> list[SegmentHead]:
        return [segment for head in self.index.heads() for segment in head.segments.values()]
