"""Word maps: where in the video a word is attended from (`vt`) and where it looks (`tv`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from probe import attend
from probe.call import AttentionCall
from probe.errors import WordError
from probe.layout import TokenLayout
from probe.plan import Handler, Stage
from probe.site import Branch, Where, Which
from probe.word import Prompt

Direction = Literal["vt", "tv"]
CONDITIONAL = Which(guided=True)


@dataclass(eq=False)
class WordMaps(Handler):
    """Lift of each word on each video token, exact, streamed; 1.0 = uniform attention.

    `vt` (video rows, text columns): `sum_{j in word} p_ij * n_keys / |word|` for video token i, the softmax joint
    over all keys. `tv` (text rows, video columns): `mean_{i in word} p_ij * n_keys` for video token j. `n_keys`
    counts all keys of the joint softmax, padding included (CogVideoX does not mask it). DiTCtrl sums the columns of a
    word and uses `vt` only; its map is `vt * |word| / n_keys`, min-max normalised per frame.

    `per_head` keeps heads apart, else their mean is kept. Conditional branches only; the unconditional half
    shows another prompt. A branch shows the words of its prompt (of the nearer one when interpolated); words it does
    not have are left out.

    After a run `maps[(step, branch, layer)]` is a dict: direction -> float32 [heads or 1, words, F, Y, X], in the
    order of `words_of[branch]`.
    """

    words: tuple[str, ...]
    where: Where = field(default_factory=Where)
    directions: tuple[Direction, ...] = ("vt", "tv")
    per_head: bool = False
    stage = Stage.USED
    needs_lse = True

    def __init__(
        self,
        *words: str,
        where: Where | None = None,
        directions: Sequence[Direction] = ("vt", "tv"),
        per_head: bool = False,
    ) -> None:
        self.words, self.directions, self.per_head = tuple(dict.fromkeys(words)), tuple(directions), per_head
        self.where = conditional(where)
        self.begin((), 0, 0)

    def __str__(self) -> str:
        return f"WordMaps({', '.join(self.words) or 'every word'})"

    def begin(self, prompts: Sequence[Prompt], steps: int, layers: int) -> None:
        """Forget the last run.

        Raises:
            WordError: a word is in none of the prompts.
        """
        self.maps: dict[tuple[int, Branch, int], dict[str, NDArray[np.float32]]] = {}
        self.words_of: dict[Branch, tuple[str, ...]] = {}
        self._count = max([len(self.words), *(len(_words_of(self.words, prompt)) for prompt in prompts)])
        for word in self.words if prompts else ():
            if not any(prompt.has(word) for prompt in prompts):
                spoken = "; ".join(", ".join(prompt.words) for prompt in prompts)
                raise WordError(f"A word must be in a prompt. Got {word!r}. The words are: {spoken}.")

    def serve(self, call: AttentionCall, rows: tuple[int, ...]) -> None:
        """Reduce the call to maps of its branches `rows`."""
        for row in rows:
            branch = call.branches[row]
            prompt = call.prompt_of(branch)
            words = _words_of(self.words, prompt)
            if words:
                tokens = [[call.layout.text_slice.start + t for t in prompt.tokens_of(w)] for w in words]
                self.words_of[branch] = words
                key = (call.site.step, branch, call.site.layer)
                self.maps[key] = {d: self._map(call, row, tokens, d) for d in self.directions}

    def cost(self, layout: TokenLayout) -> float:
        """A few columns and a few rows of the matrix."""
        return len(self.directions) * self._count / layout.total

    def word_map(
        self, word: str, step: int, layer: int, branch: Branch, direction: Direction = "vt"
    ) -> NDArray[np.float32]:
        """Head-mean lift [F, Y, X] of one word."""
        index = self.words_of[branch].index(word)
        return self.maps[step, branch, layer][direction][:, index].mean(0)

    def _map(self, call: AttentionCall, row: int, tokens: list[list[int]], direction: Direction) -> NDArray[np.float32]:
        lift = _lift(call, row, tokens, self.where, direction)
        if not self.per_head:
            lift = lift.mean(0, keepdim=True)
        return lift.unflatten(-1, call.layout.grid.shape).float().cpu().numpy()


def _words_of(asked: Sequence[str], prompt: Prompt) -> tuple[str, ...]:
    """The asked words that a prompt has; every word, each once whatever its case, when none is asked for."""
    every: dict[str, str] = {}
    for word in prompt.words:
        every.setdefault(word.casefold(), word)
    return tuple(word for word in asked or every.values() if prompt.has(word))


def conditional(where: Where | None) -> Where:
    """`where`, on conditional branches if it does not choose branches itself."""
    where = where or Where()
    return where if where.branches is not None else replace(where, branches=CONDITIONAL)


def _lift(call: AttentionCall, row: int, tokens: list[list[int]], where: Where, direction: Direction) -> Tensor:
    """Lift [H, W, video] of words given as token positions: exact probabilities of a few columns, or of a few rows."""
    heads, video = list(where.head_list(call.q.shape[1])), call.layout.video_slice
    words = [token for word in tokens for token in word]
    rows, columns, axis = (video, words, -1) if direction == "vt" else (words, video, -2)
    q, k, lse = call.q[row, heads][:, rows], call.k[row, heads][:, columns], call.lse()[row, heads][:, rows]
    parts = attend.probabilities(q, k, lse, call.scale).split([len(word) for word in tokens], dim=axis)
    return torch.stack([part.mean(axis) for part in parts], 1) * call.k.shape[-2]
