"""Output-space saliency: where in the video the attention output resembles that of a word."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from probe.call import AttentionCall
from probe.entry import Entry, index_of
from probe.errors import UsageError
from probe.layout import TokenLayout
from probe.plan import Stage
from probe.readout.base import refuse_unknown
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
    that video the words of this branch are. Only where text has rows of its own: joint attention. After a run `values[at]` is a dict: "cosine" and "dot", float32 [heads
    or 1, words, F, Y, X], in the order of `words_of[branch]`. Errors: 5e-6 in float32, 1e-2 in half precision, of the
    cosine and of the largest dot product.

    Source: output-space saliency of ConceptAttention (Helbling et al. 2025, arXiv 2502.04320). Its concept stream, which
    looks without being looked at, is a second prompt whose video rows take q, k and v of the first one, read with
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
        self._videos: dict[Branch, Entry] = {}
        refuse_unknown(self.words, prompts)

    def serve(self, call: AttentionCall, rows: tuple[int, ...]) -> None:
        """Reduce each entry of `rows` beside the video it is compared with.

        Raises:
            UsageError: the call does not hold that video.
        """
        heads = self.where.head_list(call.q.shape[1])
        self._videos = {call.branches[row]: call.entry(self._video_of(call, row), heads) for row in rows}
        super().serve(call, rows)
        self._videos = {}

    def _video_of(self, call: AttentionCall, row: int) -> int:
        """The batch entry whose video is read."""
        branch, asked = call.branches[row], self.video_from
        if asked is None:
            return row
        other = asked(branch) if callable(asked) else replace(branch, prompt=asked)
        if other not in call.branches:
            raise UsageError(
                f"Saliency in the video of another branch must have it in the same call. Got none of {other} at "
                f"{call.site}. Run both prompts in one batch."
            )
        return call.branches.index(other)

    def reduce(self, entry: Entry) -> dict[str, Tensor] | None:
        """cosine and dot [heads or 1, words, F, Y, X]."""
        words = tuple(word for word in self.words if entry.prompt.has(word))
        if not words:
            return None
        self.words_of[entry.branch] = words
        seen = self._videos[entry.branch]
        text = by_head(self.tokens(entry), self.per_head)[:, entry.rows.text_slice]
        video = by_head(self.tokens(seen), self.per_head)[:, seen.rows.video_slice]
        places = (index_of(entry.prompt.tokens_of(word), text.device) for word in words)
        means = torch.stack([text[:, place].mean(1) for place in places], 1)
        made = {"cosine": F.normalize(means, dim=-1) @ F.normalize(video, dim=-1).mT, "dot": means @ video.mT}
        return {name: values.unflatten(-1, seen.rows.grid.shape) for name, values in made.items()}

    def cost(self, layout: TokenLayout) -> float:
        """Two dot products per word and video token."""
        return len(self.words) / layout.total
