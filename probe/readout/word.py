"""Word maps: where in the video a word is attended from (`vt`) and where it looks (`tv`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from probe.entry import Entry, on_device
from probe.errors import UsageError
from probe.layout import TokenLayout
from probe.plan import Stage
from probe.readout.base import At, Readout, refuse_unknown
from probe.site import JOINT, Branch, Where
from probe.word import Prompt

Direction = Literal["vt", "vt_text", "tv", "mean"]


class WordMaps(Readout):
    """Lift of each word on each video token, exact, streamed; 1.0 = uniform attention.

    - `vt` (video rows, text columns): `sum_{j in word} p_ij * n_keys / |word|` for video token i, the softmax joint
      over all keys. DiTCtrl sums the columns of a word and uses this one; its map is `vt * |word| / n_keys`, min-max
      normalised per frame.
    - `vt_text`: the same, conditional on text: p renormalised over the text columns, n_keys = text tokens (ConsistEdit
      on CogVideoX).
    - `tv` (text rows, video columns): `mean_{i in word} p_ij * n_keys` for video token j.
    - `mean`: the mean of `vt` and `tv` (FreeFlux averages column and transposed row).

    `n_keys` counts all keys that may be seen, padding included where the model attends to it (CogVideoX does).
    Where text and video attend apart (Wan) there are no text rows: `vt` is over the text keys alone and equals
    `vt_text`, and `tv` is refused.

    Without `words` every word of a prompt is mapped, or its first `most`. `per_head` keeps heads apart, else their mean
    is kept. Conditional branches only; the unconditional half shows
    another prompt. A branch shows the words of its prompt (of the nearer one when interpolated); words it does not have
    are left out.

    After a run `values[at]` is a dict: direction -> float32 [heads or 1, words, F, Y, X], in the order of
    `words_of[branch]`. Relative error 5e-6 in float32, 2e-2 in half precision.
    """

    stored = "maps"

    def __init__(
        self,
        *words: str,
        where: Where | None = None,
        directions: Sequence[Direction] = ("vt", "tv"),
        per_head: bool = False,
        most: int | None = None,
        stage: Stage = Stage.USED,
    ) -> None:
        self.words, self.directions, self.per_head = tuple(dict.fromkeys(words)), tuple(directions), per_head
        self.most = most
        unknown = sorted(set(directions) - set(get_args(Direction)))
        if unknown or not directions:
            raise UsageError(
                f"Directions of word maps must be some of {', '.join(get_args(Direction))}. Got {unknown or 'none'}."
            )
        self.kinds = JOINT if {"tv", "mean"} & set(directions) else JOINT | {"cross"}
        super().__init__(where or Where(), stage)

    def __str__(self) -> str:
        return f"WordMaps({', '.join(self.words) or 'every word'})"

    def begin(self, prompts: Sequence[Prompt], steps: int, layers: int) -> None:
        """Forget the last run.

        Raises:
            WordError: a word is in none of the prompts.
        """
        super().begin(prompts, steps, layers)
        self.words_of: dict[Branch, tuple[str, ...]] = {}
        self._tokens: dict[Branch, list[tuple[int, ...]]] = {}
        self._count = max([len(self.words), *(len(self._words_of(prompt)) for prompt in prompts)])
        refuse_unknown(self.words, prompts)

    def reduce(self, entry: Entry) -> dict[str, Tensor] | None:
        """direction -> [heads or 1, words, F, Y, X]."""
        if entry.branch not in self._tokens:
            words = self._words_of(entry.prompt)
            self._tokens[entry.branch] = [entry.prompt.tokens_of(word) for word in words]
            self.words_of |= {entry.branch: words} if words else {}
        tokens = self._tokens[entry.branch]
        if not tokens:
            return None
        return {direction: self._map(entry, tokens, direction) for direction in self.directions}

    def _keep(self, at: At, value: Any, entry: Entry) -> None:
        super()._keep(at, value, entry)
        self.words_of[at.branch] = self.words_of[entry.branch]

    def cost(self, layout: TokenLayout) -> float:
        """A few columns and a few rows of the matrix; all text columns when conditional on text."""
        thin = {"vt": self._count, "tv": self._count, "mean": 2 * self._count, "vt_text": self._count + layout.text}
        return sum(thin[direction] for direction in self.directions) / layout.total

    def word_map(
        self, word: str, step: int, layer: int, branch: Branch, direction: Direction = "vt"
    ) -> NDArray[np.float32]:
        """Head-mean lift [F, Y, X] of one word."""
        index = self.words_of[branch].index(word)
        (at, *_) = self.at(step=step, layer=layer, branch=branch)
        return self.values[at][direction][:, index].mean(0)

    def _words_of(self, prompt: Prompt) -> tuple[str, ...]:
        """The asked words that a prompt has; every word, each once whatever its case, when none is asked for."""
        every: dict[str, str] = {}
        for word in prompt.words:
            every.setdefault(word.casefold(), word)
        has = [word for word in self.words or every.values() if prompt.has(word)]
        return tuple(has if self.words else has[: self.most])

    def _map(self, entry: Entry, tokens: list[tuple[int, ...]], direction: str) -> Tensor:
        if direction == "mean":
            lift = (_lift(entry, tokens, "vt") + _lift(entry, tokens, "tv")) / 2
        else:
            lift = _lift(entry, tokens, direction)
        lift = lift if self.per_head else lift.mean(0, keepdim=True)
        return lift.unflatten(-1, entry.rows.grid.shape)


def _lift(entry: Entry, tokens: list[tuple[int, ...]], direction: str) -> Tensor:
    """Lift [H, words, video] of words given as text positions: exact probabilities of a few columns, or a few rows."""
    sizes, flat = [len(word) for word in tokens], [token for word in tokens for token in word]
    if direction == "tv":
        words = [entry.rows.text_slice.start + token for token in flat]
        weights = entry.weights(rows=words, columns=entry.columns.video_slice)
        return _means(sizes, weights).mT @ weights * entry.keys
    words = [entry.columns.text_slice.start + token for token in flat]
    within, keys = (entry.columns.text_slice, entry.columns.text) if direction == "vt_text" else (None, entry.keys)
    weights = entry.weights(entry.rows.video_slice, words, within)
    return (weights @ _means(sizes, weights)).mT * keys


def _means(sizes: list[int], like: Tensor) -> Tensor:
    """[tokens, words]: multiplied by it, the tokens of each word are averaged."""
    rows = [[(word == at) / size for at in range(len(sizes))] for word, size in enumerate(sizes) for _ in range(size)]
    return on_device(tuple(x for row in rows for x in row), like.dtype, like.device).view(-1, len(sizes))
