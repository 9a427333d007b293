"""Masks that a run makes of its own attention: where words are looked at, cut, and used as an area or a gate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from control.address import Found, Rest, Side
from control.propagate import propagated
from control.tally import Tally, Within
from probe import mask
from probe.call import AttentionCall
from probe.errors import LayoutError, PlanError, UsageError
from probe.plan import Handler, Stage
from probe.readout.base import refuse_unknown
from probe.readout.word import Direction, WordMaps
from probe.site import JOINT, Branch, Where, Which, chosen, unperturbed
from probe.word import Prompt


@dataclass(eq=False)
class ExtractMask(Found, Handler):
    """A mask of the video from the word maps of a run, used while it goes on. Give it to the trace, and to edits as
    `rows`, `columns` or `gate`, or to a `Blend`.

    Maps (see `probe.WordMaps`): the tokens of all `words` together, mean over heads; `direction` vt (joint
    probabilities), vt_text (conditional on text), tv, tv_video (conditional on video) or mean. They are averaged over
    the calls `where` selects, conditional unperturbed branches if it does not choose them, separately for each prompt,
    segment and copy.

    - `propagate` n: each call's map, raised to `power`, goes n times through that call's own attention among video
      tokens, mean of heads (AttenCraft: 4 and 2). n attention calls; the matrix is never stored.
    - The mask is made as `probe.mask.extract` does: blur by `sigma` patches, min-max normalisation `per` frame or clip,
      then a `threshold`, otsu or the top share `value`, an opening by `radius`, the largest `component`. With `rivals`
      the score is the normalised map less the largest of theirs, so that a threshold is a margin.
    - `soft`: the normalised score itself, 0 to 1, for gates and blends.

    `source` says whose maps an entry's area is made of: None its own, a prompt, or a function from its branch. `~mask`
    is the rest of the video.

    `within` "run": maps of the steps before, so that a mask changes once per step. "step": those of the running forward
    alone, cumulated over its layers (DiTCtrl; with `stage=Stage.BEFORE` a call's own map is among them). Until there is
    a map, as in the first step, nothing is inside and edits do nothing; with `unknown="all"` the whole video is.

    `frozen` keeps the maps of an earlier run as they are (ConsistEdit's separate pass); set it between the runs.

    Raises:
        UsageError: settings of the mask that do not fit together, or a word that is its own rival.
    """

    words: str | tuple[str, ...]
    source: int | Callable[[Branch], Branch] | None = None
    rivals: tuple[str, ...] = ()
    direction: Direction | Literal["tv_video"] = "vt"
    sigma: float = 0.0
    per: mask.Per = "clip"
    method: mask.Method = "otsu"
    value: float | None = None
    radius: int = 0
    component: bool = False
    propagate: int = 0
    power: float = 1.0
    soft: bool = False
    within: Within = "run"
    unknown: Literal["none", "all"] = "none"
    frozen: bool = False
    where: Where = field(default_factory=Where)
    stage: Stage = Stage.USED
    needs_lse = True

    def __post_init__(self) -> None:
        self.words = (self.words,) if isinstance(self.words, str) else tuple(dict.fromkeys(self.words))
        if not self.words or set(self.words) & set(self.rivals):
            raise UsageError(
                f"A mask must have words, and rivals other than these. Got {self.words} against {self.rivals}. Name "
                "the object, and what it is told apart from."
            )
        if self.propagate < 0:
            raise UsageError(f"A map must be propagated 0 times or more. Got {self.propagate}. Take 0 for not at all.")
        self._cut(self._score(torch.zeros(1 + len(self.rivals), 1, 1, 2)))  # settings that do not fit are refused now
        seen = self.where.branches or unperturbed
        if isinstance(self.source, int):
            mine = Which(prompt=self.source)
            self.where = replace(self.where, branches=lambda branch: mine(branch) and seen(branch))
        else:
            self.where = replace(self.where, branches=seen)
        direction: Any = "tv" if self.direction == "tv_video" else self.direction
        self._lifts = WordMaps(*self.words, *self.rivals, where=self.where, directions=(direction,))
        self.kinds = JOINT if self.propagate or self.direction == "tv_video" else self._lifts.kinds
        self._tallies: dict[Branch, Tally] = {}
        self._running = False

    def __str__(self) -> str:
        return f"ExtractMask({', '.join(self.words)})"

    def __invert__(self) -> Found:
        return _Outside(self)

    def begin(self, prompts: Sequence[Prompt], steps: int, layers: int) -> None:
        """Forget the last run, unless frozen.

        Raises:
            WordError: a prompt it looks at does not have a word.
            UsageError: the source is no prompt of the run.
        """
        self._running = True
        if self.frozen:
            return
        self._lifts.begin((), steps, layers)
        self._tallies = {}
        self._refuse_missing(prompts)

    def end(self) -> None:
        """The masks stay."""
        self._running = False

    def serve(self, call: AttentionCall, rows: tuple[int, ...]) -> None:
        """Add the maps of the entries that have the words."""
        if self.frozen:
            return
        call.lse()
        for row in rows:
            maps = self.maps(call, row)
            for place in dict.fromkeys(_place(branch) for branch in call.standing(row) if not _twice(call, branch)):
                if maps is not None:
                    self._tallies.setdefault(place, Tally()).add(maps, call.site.step)

    def inside(self, call: AttentionCall, entry: int, side: Side) -> Tensor:
        """bool, one per row or column; with `soft` weights in the dtype of q.

        Raises:
            PlanError: the mask was not given to the trace, or frozen without maps.
            LayoutError: a frozen mask of another grid.
        """
        tokens, made = getattr(call, side), self._at(call, entry)
        full = torch.zeros(tokens.total, dtype=call.q.dtype if self.soft else torch.bool, device=call.q.device)
        if not tokens.video:
            return full
        if made is not None and made.shape != tokens.grid.shape:
            raise LayoutError(
                f"A mask must lie on the grid of the video, {tokens.grid}. Got {tuple(made.shape)} from {self}. Freeze "
                "the mask of a run of the same size."
            )
        full[tokens.video_slice] = self.unknown == "all" if made is None else made.flatten()
        return full

    def known(self, call: AttentionCall, entry: int) -> bool:
        """Whether there are maps for an entry by now."""
        return self._at(call, entry) is not None

    def mask(self, prompt: int | Branch = 0) -> NDArray[np.bool_] | None:
        """The mask [F, Y, X] from all maps so far, True = inside; None if there are none."""
        score = self.score(prompt)
        return None if score is None else self._cut(score)

    def score(self, prompt: int | Branch = 0) -> NDArray[np.floating[Any]] | None:
        """What the mask is cut from, [F, Y, X], 0 to 1 (less with rivals); None if there are no maps."""
        count, total = self._tally_of(prompt).upto(self.within)
        return self._score(total / count) if isinstance(total, Tensor) else None

    def values(self, prompt: int | Branch = 0) -> NDArray[Any] | None:
        """The mask, or with `soft` the score from 0 on."""
        score = self.score(prompt)
        return None if score is None else self._values(score)

    def _refuse_missing(self, prompts: Sequence[Prompt]) -> None:
        """Each prompt it looks at must have the words; some prompt, where that is known only from the branches."""
        if isinstance(self.source, int) and prompts:
            chosen(self.source, len(prompts))
        words, seen = (*self.words, *self.rivals), self.where.rows([Branch(prompt=i) for i in range(len(prompts))])
        if callable(self.source) or not seen:
            refuse_unknown(words, prompts)
            return
        for prompt in seen:
            for word in words:
                prompts[prompt].tokens_of(word)

    def _tally_of(self, prompt: int | Branch) -> Tally:
        """The maps that the area of a branch is made of."""
        branch = Branch(prompt=prompt) if isinstance(prompt, int) else prompt
        if isinstance(self.source, int):
            branch = replace(branch, prompt=self.source)
        elif self.source is not None:
            branch = self.source(branch)
        return self._tallies.get(_place(branch), Tally())

    def _at(self, call: AttentionCall, entry: int) -> Tensor | None:
        """The values [F, Y, X] for an entry, on the device of its maps: made once for as many maps as there are."""
        if not (self._tallies if self.frozen else self._running):
            raise PlanError(
                f"A mask must be given to the trace of the run it is used in, or be frozen after another. Got {self} "
                "without maps. Pass it to trace() beside the edits."
            )
        tally = self._tally_of(call.branches[entry])
        count, total = tally.upto(self.within, None if self.frozen else call.site.step)
        if not isinstance(total, Tensor):
            return None
        if tally.made is None or tally.made[0] != (tally.step, count):
            values = self._values(self._score(total / count))
            tally.made = (tally.step, count), torch.as_tensor(values, device=total.device)
        return tally.made[1]

    def _score(self, maps: Tensor) -> NDArray[np.floating[Any]]:
        """[1 + rivals, F, Y, X] -> [F, Y, X]."""
        own, *others = (mask.normalise(mask.smooth(values, self.sigma), self.per) for values in maps.cpu().numpy())
        return own - np.max(others, 0) if others else own

    def _values(self, score: NDArray[Any]) -> NDArray[Any]:
        return score.clip(0, 1) if self.soft else self._cut(score)

    def _cut(self, score: NDArray[Any]) -> NDArray[np.bool_]:
        return mask.extract(score, self.method, self.value, 0, "none", self.radius, self.component)

    def maps(self, call: AttentionCall, row: int) -> Tensor | None:
        """The lift of the words together and of each rival for a batch entry, [1 + rivals, F, Y, X]; None without all
        of the words.
        """
        entry = call.entry(row, self.where.head_list(call.q.shape[1]))
        lifts = self._lifts.reduce(entry.within_video if self.direction == "tv_video" else entry)
        if lifts is None or len(self._lifts.words_of[entry.branch]) < len(self.words) + len(self.rivals):
            return None
        (lift,) = (values[0] for values in lifts.values())
        sizes = lift.new_tensor([len(entry.prompt.tokens_of(word)) for word in self.words])
        own = torch.tensordot(sizes / sizes.sum(), lift[: len(sizes)], 1)
        maps = torch.stack([own, *lift[len(sizes) :]])
        return propagated(entry.within_video, maps, self.propagate, self.power) if self.propagate else maps


class _Outside(Rest):
    """The rest of the video once the mask is known; until then what the mask itself is."""

    def __init__(self, area: ExtractMask) -> None:
        super().__init__(area)
        self.found = area

    def inside(self, call: AttentionCall, entry: int, side: Side) -> Tensor:
        known = self.found.known(call, entry)
        return super().inside(call, entry, side) if known else self.found.inside(call, entry, side)


def _twice(call: AttentionCall, branch: Branch) -> bool:
    """Whether it is a target whose segment is there as a source too: a segment counts once a step."""
    return branch.role == "target" and call.row_of(replace(branch, role="source")) is not None


def _place(branch: Branch) -> Branch:
    """What maps are kept apart by: prompt, segment and copy, in whatever half and role."""
    return replace(branch, role="plain", guided=True)
