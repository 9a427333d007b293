"""What words say where the object is: by pair of segments, with other words in other prompts. No torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from ditctrl.segment import Segments
from probe.errors import UsageError
from probe.site import Branch

Said = tuple[tuple[int, str, float], ...]
"""Prompts, phrases and weights: the map of a branch is the weighted sum over the tokens of each phrase."""


class Pairing(ABC):
    """Which branch a target takes from, and what says where the object is in either. Branches are conditional ones."""

    @abstractmethod
    def source(self, target: Branch) -> Branch | None:
        """The source of a target; None of what is no target."""

    @abstractmethod
    def said(self, branch: Branch, lends: bool) -> Said:
        """The words for a branch that lends keys and values, or that takes them; nothing if it does neither."""

    @abstractmethod
    def every(self) -> Iterator[tuple[int, str]]:
        """All prompts and phrases that are looked up."""


@dataclass(frozen=True)
class OfSegments(Pairing):
    """Each segment takes from the one before. `phrases` are a pair for each gap between two prompts: how the prompt
    before and the prompt after call the object (one pair for a single prompt). Segments of one prompt follow the gap
    behind it, those of the last prompt the gap before.

    An interpolated segment shows (1 - a) of one prompt and a of the next: the columns of the phrase in either prompt
    count as much. The authors have one list of token numbers for all prompts (INF:41-47), to which this comes down if
    the phrase is in the same place of each.

    Raises:
        UsageError: not one pair for each gap.
    """

    segments: Segments
    phrases: tuple[tuple[str, str], ...]

    def __post_init__(self) -> None:
        gaps = max(1, self.segments.prompts - 1)
        if len(self.phrases) != gaps:
            raise UsageError(
                f"Objects must be one for each of {self.segments.prompts} prompts, or one pair for each of {gaps} "
                f"turns from prompt to prompt. Got {len(self.phrases)} pairs. Name the object in each."
            )

    def source(self, target: Branch) -> Branch | None:
        """The source role of the segment before."""
        return self.segments.previous_segment(target) if target.role == "target" else None

    def said(self, branch: Branch, lends: bool) -> Said:
        """The phrases of the gap between the two segments."""
        if branch.role != ("source" if lends else "target"):
            return ()
        prompt, mix = self.segments.condition(branch.segment)
        before, after = self.phrases[self._gap(branch.segment + lends)]
        if mix:
            return (prompt, before, 1 - mix), (prompt + 1, after, mix)
        return ((prompt, before if prompt == self._gap(branch.segment + lends) else after, 1.0),)

    def every(self) -> Iterator[tuple[int, str]]:
        """The pairs of all gaps."""
        for gap, (before, after) in enumerate(self.phrases):
            yield gap, before
            yield min(gap + 1, self.segments.prompts - 1), after

    def _gap(self, segment: int) -> int:
        """The gap that the pair (segment - 1, segment) is in."""
        return min(self.segments.condition(segment - 1)[0], len(self.phrases) - 1)


@dataclass(frozen=True)
class OfPrompts(Pairing):
    """Prompts take from prompt `of`, side by side in a batch; `phrases` is how each prompt calls the object."""

    of: int
    phrases: tuple[str, ...]

    def source(self, target: Branch) -> Branch | None:
        """The same branch of the source's prompt."""
        return None if target.prompt == self.of else replace(target, prompt=self.of)

    def said(self, branch: Branch, lends: bool) -> Said:
        """The phrase of its prompt."""
        does = lends == (branch.prompt == self.of)
        return ((branch.prompt, self.phrases[branch.prompt], 1.0),) if does else ()

    def every(self) -> Iterator[tuple[int, str]]:
        """Each prompt with its phrase."""
        return enumerate(self.phrases)


def pairs(prompts: int, given: str | Sequence[str] | Sequence[Sequence[str]]) -> tuple[tuple[str, str], ...]:
    """A pair for each gap: of one phrase for all prompts, of a phrase for each prompt, or of pairs."""
    if isinstance(given, str):
        given = [given] * prompts
    if all(isinstance(one, str) for one in given):
        each = [str(one) for one in given]
        return tuple(pairwise(each)) if len(each) > 1 else ((each[0], each[0]),)
    return tuple((one[0], one[1]) for one in given)
