"""Masks from a concept stream: where the attention output of a video resembles that of words it never sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from control.extract import ExtractMask
from probe.call import AttentionCall
from probe.errors import UsageError
from probe.readout.saliency import OutputSaliency
from probe.site import JOINT
from probe.word import Prompt


@dataclass(eq=False)
class ConceptMask(ExtractMask):
    """An `ExtractMask` whose maps are the shares of the words in a softmax over words and rivals of <o_i, w>: o_i the
    attention output of a video token of the prompt `video`, w the mean output over the tokens of a word in the branch
    that `source` names. Heads stand side by side.

    For a concept stream let the video rows of the concept branch take q, k and v from the prompt `video` in every layer
    (a Transfer): its text rows then look at that video, which itself stays as it is. `direction`, `propagate` and
    `power` do not apply.

    Source: ConceptAttention (Helbling et al. 2025, arXiv 2502.04320).

    Raises:
        UsageError: no rivals to tell the words from.
    """

    video: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.rivals:
            raise UsageError(f"A concept must have rivals to be told from. Got none for {self}. Name another concept.")
        self.kinds = JOINT
        self._outputs = OutputSaliency(*self.words, *self.rivals, where=self.where, video_from=self.video)

    def __str__(self) -> str:
        return f"ConceptMask({', '.join(self.words)})"

    def begin(self, prompts: Sequence[Prompt], steps: int, layers: int) -> None:
        """Forget the last run, unless frozen."""
        super().begin(prompts, steps, layers)
        self._outputs.begin((), steps, layers)

    def maps(self, call: AttentionCall, row: int) -> Tensor | None:
        """The share of the words together, [1, F, Y, X], 0 to 1; None without all of the words."""
        made = self._outputs.of(call, row)
        if made is None or made["dot"].shape[1] < len(self.words) + len(self.rivals):
            return None
        return made["dot"][0].softmax(0)[: len(self.words)].sum(0, keepdim=True)
