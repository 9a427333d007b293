"""Settling: how much the attention of a layer still changes from one denoising step to the next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor

from probe.entry import Entry
from probe.likeness import Keys, Map, Measure
from probe.plan import Stage
from probe.readout.similarity import Compared, map_of
from probe.site import Branch, Site, Span, Where, chosen
from probe.word import Prompt


class Settling(Compared):
    """How alike the maps of neighbouring steps are: each selected step against the selected step before it.

    a is the step before and b the step of `values[at]`. The first selected step, also of a resumed run, has no value.
    Measures, keys, values and errors are those of `Similarity`. A head whose similarity stays near 1 has settled.

    Memory: q, k and lse of the step before stay on the device for every layer and branch, until the last step, or `end`
    where that has fewer turns (Heun's method); with CogVideoX-2B in half precision 139 MB each.
    """

    label = "settling"
    entries = 1

    def __init__(
        self,
        layers: Span = None,
        where: Where | None = None,
        measures: Sequence[Measure] = ("bhattacharyya",),
        keys: Keys = "all",
        stage: Stage = Stage.USED,
    ) -> None:
        where = where or Where()
        super().__init__(where if layers is None else replace(where, layers=layers), measures, keys, stage)

    def begin(self, prompts: Sequence[Prompt], steps: int, layers: int) -> None:
        """Forget the last run."""
        super().begin(prompts, steps, layers)
        self._before: dict[tuple[Site, Branch], tuple[int, Map]] = {}
        self._steps = chosen(self.where.steps, steps) if steps else ()

    def end(self) -> None:
        """Let go of the maps that the last step met no more."""
        self._before = {}

    def reduce(self, entry: Entry) -> dict[str, Tensor] | None:
        """measure -> [H, 2]; None in the first step, and where a segment had another role in the step before."""
        place, at = (replace(entry.site, step=0), entry.branch), self._steps.index(entry.site.step)
        before, now = self._before.pop(place, None), map_of(entry, self.keys)
        if at + 1 < len(self._steps):
            self._before[place] = at, Map(*(x.clone() for x in now))
        return self._compared(before[1], now, entry) if before is not None and before[0] == at - 1 else None

    def _compared(self, before: Map, now: Map, entry: Entry) -> dict[str, Tensor]:
        width = max(before.q.shape[-1], now.q.shape[-1])
        return self.compare(_of(width, before), _of(width, now), entry.scale, entry.rows)


def _of(width: int, one: Map) -> Map:
    """Edits may add channels to q and k; zeros change no logit."""
    q, k = (F.pad(x, (0, width - x.shape[-1])) for x in (one.q, one.k))
    return Map(q, k, one.lse)
