"""Output-space saliency: where in the video the attention output resembles that of a word."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from probe.call import AttentionCall
from probe.entry import Entry, index_of
from probe.errors import UsageError
from probe.layout import TokenLayout
from probe.plan import Stage
from probe.readout.base import At, refuse_unknown
from probe.readout.feature import TokenReadout, by_head
from probe.site import JOINT, Branch, Where
from probe.word import Prompt


class OutputSaliency(TokenReadout):
    """Cosine and dot product of the attention output of each video token with that of a word.

    With o_i the output of row i (before the projection that follows) and w the mean of o over the tokens of a word:
    cosine = <o_i, w> / (|o_i| |w|), -1 to 1, 0 for an output of 0; dot = <o_i, w>, in squared units of v. With
    `per_head` inside each head, else over all chosen heads side by side.

    Conditional branches only; a branch shows the words of its prompt, and leaves out those it does not have. With
    `video_from`, a prompt or a function of the branch, the video rows are those of another branch of the call: where in
    that video the words of this branch are. Only where text has rows of its own: joint attention. After a run
    `values[at]` is a dict: "cosine" and "dot", float32 [heads or 1, words, F, Y, X], in the order of
    `words_of[branch]`. Errors: 5e-6 in float32, 1e-2 in half precision, of the cosine and of the largest dot product.

    Source: output-space saliency of ConceptAttention (Helbling et al. 2025, arXiv 2502.04320). Its concept stream looks
    without being looked at: here a second prompt whose video rows take q, k and v of the first one, read with
    `video_from`; else a word must be in the prompt and its own rows are read. Departures: no softmax over words, and
    layers are not averaged; `control.ConceptMask` does both.
    """

    def __init__(
        self,
        *words: str,
        where: Where | None = None,
        per_head: bool = False,
        stage: Stage = Stage.USED,
        video_from: int | Callable[[Branch], Branch] | None = None,
    ) -> None:
        self.words, self.per_head, self.video_from = tuple(dict.fromkeys(words)), per_head, video_from
        if not words:
            raise UsageError("Output saliency must have at least one word. Got none. Name words of the prompt.")
        super().__init__("o", ("o",), where, stage)
        self.kinds = JOINT

    def __str__(self) -> str:
        return f"OutputSaliency({', '.join(self.words)})"

    def begin(self, prompts: Sequence[Prompt], steps: int, layers: int) -> None:
        """Forget the last run.

        Raises:
            WordError: a word is in none of the prompts.
        """
        super().begin(prompts, steps, layers)
        self.words_of: dict[Branch, tuple[str, ...]] = {}
        refuse_unknown(self.words, prompts)

    def of(self, call: AttentionCall, row: int) -> dict[str, Tensor] | None:
        """What `reduce` makes of one batch entry; it is not kept."""
        with self.looking_at(call):
            return self.reduce(call.entry(row, self.where.head_list(call.q.shape[1])))

    def reduce(self, entry: Entry) -> dict[str, Tensor] | None:
        """cosine and dot [heads or 1, words, F, Y, X].

        Raises:
            UsageError: the call does not hold the video that is compared.
        """
        words = tuple(word for word in self.words if entry.prompt.has(word))
        if not words:
            return None
        self.words_of[entry.branch] = words
        seen = self._video_of(entry)
        text = by_head(self.tokens(entry), self.per_head)[:, entry.rows.text_slice]
        video = by_head(self.tokens(seen), self.per_head)[:, seen.rows.video_slice]
        places = (index_of(entry.prompt.tokens_of(word), text.device) for word in words)
        means = torch.stack([text[:, place].mean(1) for place in places], 1)
        made = {"cosine": F.normalize(means, dim=-1) @ F.normalize(video, dim=-1).mT, "dot": means @ video.mT}
        return {name: values.unflatten(-1, seen.rows.grid.shape) for name, values in made.items()}

    def _keep(self, at: At, value: Any, entry: Entry) -> None:
        super()._keep(at, value, entry)
        self.words_of[at.branch] = self.words_of[entry.branch]

    def _video_of(self, entry: Entry) -> Entry:
        """The batch entry whose video is read."""
        asked, branch, call = self.video_from, entry.branch, self.call
        if asked is None:
            return entry
        assert call is not None
        other = asked(branch) if callable(asked) else replace(branch, prompt=asked)
        row = call.row_of(other)
        if row is None:
            raise UsageError(
                f"Saliency in the video of another branch must have it in the same call. Got none of {other} at "
                f"{call.site}. Run both prompts in one batch."
            )
        return call.entry(row, entry.heads)

    def cost(self, layout: TokenLayout) -> float:
        """Two dot products per word and video token."""
        return len(self.words) / layout.total
