"""Similarity of the attention of two branches of one call, row by row, without forming either map."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from probe.call import AttentionCall
from probe.entry import Entry
from probe.errors import LayoutError, UsageError
from probe.layout import TokenLayout
from probe.likeness import ROWS, Keys, Map, Measure, known, means, row_similarity
from probe.plan import Stage
from probe.readout.base import At, Readout
from probe.site import JOINT, Branch, Site, Where, Which
from probe.word import Prompt

_SAID = {
    "bhattacharyya": "Bhattacharyya coefficient of two maps, 0 to 1,",
    "cosine": "cosine of two maps, 0 to 1,",
    "kl": "Kullback-Leibler divergence of two maps in nats,",
}
_WORK = {"bhattacharyya": 2.0, "cosine": 4.0, "kl": 2.0}  # plain attentions per comparison


class Compared(Readout):
    """What the readouts of similarity share: `values[at]` is a dict measure -> float32 [H, 2], means over ROWS.

    `label` begins the names of its metrics; a comparison concerns `entries` batch entries of a call.
    """

    label: ClassVar[str]
    entries: ClassVar[int]

    def __init__(self, where: Where, measures: Sequence[Measure], keys: Keys, stage: Stage) -> None:
        self.measures: tuple[Measure, ...] = known(measures, keys)
        self.keys: Keys = keys
        if keys == "video":
            self.kinds = JOINT | {"self"}
        super().__init__(where, stage)

    @property
    def definitions(self) -> dict[str, str]:
        """What each of the metrics is."""
        if self.keys == "video":
            given = "mean over video rows, given the video"
            return {f"{self.label}_{name}_within_video": f"{_SAID[name]} {given}" for name in self.measures}
        return {
            f"{self.label}_{name}_{rows}": f"{_SAID[name]} mean over {rows} rows"
            for name in self.measures
            for rows in ROWS
        }

    def metrics(self, value: Any) -> dict[str, NDArray[np.float32]]:
        """Means over video and over text rows [H]; see `definitions`."""
        rows = ROWS[:1] if self.keys == "video" else ROWS
        columns = [value[name][:, i] for name in self.measures for i in range(len(rows))]
        return dict(zip(self.definitions, columns, strict=True))

    def cost(self, layout: TokenLayout) -> float:
        """Two attentions per measure, four for the cosine; of the video alone, also its log-normaliser."""
        work = sum(_WORK[measure] for measure in self.measures) / self.entries
        return work if self.keys == "all" else (work + 1) * (layout.grid.size / layout.total) ** 2

    def compare(self, a: Map, b: Map, scale: float, rows: TokenLayout) -> dict[str, Tensor]:
        """measure -> [H, 2]."""
        return means(row_similarity(a, b, scale, self.measures), rows.with_text(0) if self.keys == "video" else rows)


class Similarity(Compared):
    """How alike two branches of one call attend: prompts, seeds, or the halves of guidance, side by side in one batch.

    `a` and `b` choose batch entries, a `Which` or any function of a `Branch`; left out, the conditional and the
    unconditional half; of both, those that the branches of `where` let through. The first of a meets the first of b,
    and so on; or every one of a the single one of b. Seeds are the same prompt given twice, or the copies of one.
    `measures` are some of bhattacharyya, cosine and kl (of a from b), as probe.likeness
    defines them. `keys` are all, or the video alone: rows and columns are the video then, and p is conditional on it;
    this also compares prompts that show a different number of text tokens.

    After a run `values[at]` (with the branch of a) is a dict: measure -> float32 [H, 2], means over the video rows and
    the text rows (padding included; NaN where there are none). `other[branch of a]` is its branch of b. Errors: 5e-6 in
    float32, 1e-4 in half precision; kl there 1e-3 of the largest logit, because the expected keys come back rounded.
    """

    label = "similarity"
    entries = 2

    def __init__(
        self,
        a: Callable[[Branch], bool] | None = None,
        b: Callable[[Branch], bool] | None = None,
        where: Where | None = None,
        measures: Sequence[Measure] = ("bhattacharyya",),
        keys: Keys = "all",
        stage: Stage = Stage.USED,
    ) -> None:
        one, two = a or Which(guided=True), b or Which(guided=False)
        self.a, self.b = one, two
        where = where or Where()
        chosen = where.branches
        where = replace(
            where, branches=lambda branch: (one(branch) or two(branch)) and (chosen is None or chosen(branch))
        )
        super().__init__(where, measures, keys, stage)

    def begin(self, prompts: Sequence[Prompt], steps: int, layers: int) -> None:
        """Forget the last run."""
        super().begin(prompts, steps, layers)
        self.other: dict[Branch, Branch] = {}
        self._partners: dict[Branch, Entry] = {}

    def serve(self, call: AttentionCall, rows: tuple[int, ...]) -> None:
        """Compare the entries of a with their partners of b.

        Raises:
            UsageError: the call does not hold both, or holds entries of a that no branch tells apart.
            LayoutError: two entries may see different keys.
        """
        heads = self.where.head_list(call.q.shape[1])
        pairs = self._pairs(call.site, call.branches)
        self.other |= {call.branches[i]: call.branches[j] for i, j in pairs.items()}
        self._partners = {call.branches[i]: call.entry(j, heads) for i, j in pairs.items()}
        super().serve(call, tuple(pairs))
        self._partners = {}

    def reduce(self, entry: Entry) -> dict[str, Tensor]:
        """measure -> [H, 2]."""
        other = self._partners[entry.branch]
        if self.keys == "all" and (entry.rows, entry.columns) != (other.rows, other.columns):
            raise LayoutError(
                f"Compared maps must be over the same keys. Got {entry.columns.text} and {other.columns.text} text "
                f'tokens at {entry.site}. Compare with keys="video", or prompts of one length.'
            )
        return self.compare(map_of(entry, self.keys), map_of(other, self.keys), entry.scale, entry.rows)

    def _keep(self, at: At, value: Any, entry: Entry) -> None:
        super()._keep(at, value, entry)
        self.other[at.branch] = self.other[entry.branch]

    def _pairs(self, site: Site, branches: Sequence[Branch]) -> dict[int, int]:
        """Batch entry of a -> batch entry of b."""
        rows = self.where.rows(branches)
        ones, others = ([i for i in rows if side(branches[i])] for side in (self.a, self.b))
        if len(others) == 1:
            others *= len(ones)
        if not ones or len(ones) != len(others):
            raise UsageError(
                "Similarity between runs or steps needs a lockstep batch or kept Q and K. Got a call with "
                f"{len(ones)} entries of a and {len(others)} of b at {site}. Give both prompts to one call, or keep "
                "them with KeepQK and use similarity()."
            )
        if len({branches[i] for i in ones}) < len(ones):
            raise UsageError(
                f"Compared entries must be told apart by their branches. Got {branches[ones[0]]} more than once. Tell "
                "the clock a copy for each."
            )
        return dict(zip(ones, others, strict=True))


def map_of(entry: Entry, keys: Keys = "all") -> Map:
    """The map of an entry: all rows and keys, or the video rows conditional on the video."""
    if keys == "all":
        return Map(entry.q, entry.k, entry.lse)
    rows, inside = entry.rows.video_slice, entry.within_video
    return Map(entry.q[:, rows], inside.k, inside.lse[:, rows])
