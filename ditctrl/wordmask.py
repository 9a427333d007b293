"""Mask-guided KV sharing: where the object is, found by words in the attention of the running forward."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from control.address import Found, Side
from control.bias import BiasTable
from ditctrl.objects import Pairing, Said
from probe.call import AttentionCall
from probe.entry import Entry
from probe.errors import PlanError
from probe.layout import TokenLayout
from probe.plan import Handler, Stage
from probe.site import JOINT, Branch, Where, Which
from probe.word import Prompt

Region = Literal["vt", "mean"]
"""Video rows on text columns, as in the code (DC:147), or the mean with the rows of the text, as in the paper."""


class _Sum(NamedTuple):
    """The maps of a branch in the layers of a forward so far."""

    layer: int
    count: int
    total: Tensor


@dataclass(eq=False)
class WordMasks(Handler):
    """The masks of mask-guided KV sharing (DC:1784-1834), at every call that `where` selects; it changes nothing.

    Queries and keys are seen after QK-norm, before anything is shared at that layer (after RoPE where the model rotates
    them: the attention it really has; the authors' code sees them before). The map of a branch is the probability of
    its phrases' tokens, summed over these, mean over all heads and over the layers of the running forward up to this
    one. Conditional branches alone are looked at; both halves of guidance use the masks. Maps are kept in float32 where
    the code has float16. Each frame is brought to 0 to 1, (g - min) / (max - min + 1e-6), and is inside from
    `threshold` on: every frame has an inside, also where the object is not.

    `pairing` says what words; `where` selects the layers from the first one on, and the branches.

    Raises:
        WordError: (when a run begins) a prompt does not have its phrase; lists the words of the prompt.
    """

    pairing: Pairing
    where: Where
    threshold: float = 0.3
    region: Region = "vt"
    stage: Stage = field(default=Stage.BEFORE, init=False)
    kinds = JOINT
    needs_lse = True

    def __post_init__(self) -> None:
        if self.where.branches is None:
            self.where = replace(self.where, branches=Which(guided=True))

    def __str__(self) -> str:
        return f"WordMasks({self.region} >= {self.threshold:g})"

    def begin(self, prompts: Sequence[Prompt], steps: int, layers: int) -> None:
        """Forget the last run."""
        self._step, self._sums, self._maps = -1, dict[tuple[Branch, bool], _Sum](), dict[Any, Tensor]()
        for prompt, phrase in self.pairing.every() if prompts else ():
            prompts[prompt].tokens_of(phrase)

    def end(self) -> None:
        """Let go of the maps."""
        self._sums, self._maps = {}, {}

    def serve(self, call: AttentionCall, rows: tuple[int, ...]) -> None:
        """Add the maps of this layer."""
        if call.site.step != self._step:
            self._step, self._sums, self._maps = call.site.step, {}, {}
        for row in rows:
            entry, seen = call.entry(row), dict[Said, Tensor]()
            for branch in call.standing(row):
                for lends in (True, False):
                    said = self.pairing.said(branch, lends)
                    if said and said not in seen:
                        seen[said] = self._map(entry, said)
                    if said:
                        self._add(call.site.layer, branch, lends, seen[said])

    def inside(self, call: AttentionCall, branch: Branch, lends: bool) -> Tensor:
        """bool [N_video]: the mask of a branch at a call.

        Raises:
            PlanError: there is no map of it: the masks were not given to the trace, or its forward is still to come.
        """
        key = replace(branch, guided=True), lends, call.site.layer
        if key not in self._maps:
            raise PlanError(
                f"A mask must be found before it is used. Got none for {branch} at {call.site}. Give the WordMasks to "
                "the trace beside the edits, and evaluate the source before or with its target."
            )
        soft = normalised(self._maps[key], call.layout.frames)
        return soft >= self.threshold

    def cost(self, layout: TokenLayout) -> float:
        """A few columns, and a normaliser where an edit follows."""
        return 2 / layout.total

    def _add(self, layer: int, branch: Branch, lends: bool, seen: Tensor) -> None:
        """The running mean; a forward begins anew at its first layer."""
        key = branch, lends
        before = self._sums.get(key)
        if before is None or layer <= before.layer:
            before = _Sum(layer, 0, torch.zeros_like(seen))
        self._sums[key] = made = _Sum(layer, before.count + 1, before.total + seen)
        self._maps[branch, lends, layer] = made.total / made.count

    def _map(self, entry: Entry, said: Said) -> Tensor:
        """Mean over heads of the probability of some tokens, [N_video]."""
        places, factors = [], []
        for prompt, phrase, weight in said:
            tokens = entry.prompts[prompt].tokens_of(phrase)
            places += tokens
            factors += [weight] * len(tokens)
        like = torch.tensor(factors, dtype=entry.lse.dtype, device=entry.q.device)
        columns = [entry.columns.text_slice.start + place for place in places]
        looks = (entry.weights(entry.rows.video_slice, columns).mean(0) * like).sum(-1)
        if self.region == "vt":
            return looks
        rows = [entry.rows.text_slice.start + place for place in places]
        given = (entry.weights(rows, entry.columns.video_slice).mean(0) * like[:, None]).sum(0)
        return (looks + given) / 2


def normalised(values: Tensor, frames: int) -> Tensor:
    """Each frame brought to 0 to 1, [N_video]: (g - min) / (max - min + 1e-6) (DC:188-191)."""
    each = values.view(frames, -1)
    low, high = each.amin(1, keepdim=True), each.amax(1, keepdim=True)
    return ((each - low) / (high - low + 1e-6)).flatten()


class _Object(Found):
    """The object: of the rows the target's mask, of the columns its source's, whose keys the target took."""

    def __init__(self, masks: WordMasks) -> None:
        self.masks = masks

    def inside(self, call: AttentionCall, entry: int, side: Side) -> Tensor:
        """bool, one per row or column; text is outside."""
        target = replace(call.branches[entry], guided=True)
        source = self.masks.pairing.source(target)
        tokens: TokenLayout = getattr(call, side)
        full = torch.zeros(tokens.total, dtype=torch.bool, device=call.q.device)
        if source is not None:
            branch, lends = (target, False) if side == "rows" else (source, True)
            full[tokens.video_slice] = self.masks.inside(call, branch, lends)
        return full

    def __str__(self) -> str:
        return "object"


def keep_apart(masks: WordMasks, where: Where, **more: Any) -> BiasTable:
    """Video rows inside of the target's mask look at video columns inside of the source's, rows outside at columns
    outside; text rows and columns are never hidden. After the transfer of keys and values this equals the authors' two
    attentions with dense masks, mixed by the target's mask (DC:1790-1864), at the cost of the pairs that are seen.
    """
    found = _Object(masks)
    hidden = [[0.0, -math.inf], [-math.inf, 0.0]]
    return BiasTable((found, ~found), hidden, name="KeepApart", where=where, **more)


def up_to(layers: Iterable[int]) -> range:
    """The layers that the masks at some layers are made of: from the first one on."""
    return range(max(layers) + 1)
