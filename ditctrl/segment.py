"""How a long latent is cut into overlapping segments, and which prompts each segment shows. Numbers only, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from probe.errors import UsageError
from probe.site import Branch

Variant = Literal["code", "paper"]
"""Where the authors' code and the paper's formulas differ, which one is followed."""


TRANSITIONS: Mapping[Variant, int] = {"code": 2, "paper": 1}
"""Interpolated segments between two prompts: the default of the code, and the paper's number."""

MOST = 10_000
"""Segments of a story at most: days of video."""


@dataclass(frozen=True)
class Segments:
    """n prompts, `length` latent frames per segment, `overlap` of them shared with the next, `transitions`
    interpolated segments per gap. `repeats` are the segments that each prompt has to itself, one each if empty.

    Source: SV:217-312. Their "longer middle segments" m are repeats of 1, 1 + m, .., 1 + m, 1 (`middle`); their longer
    single prompt is one prompt with repeats (`alone`).

    `variant` decides how much an interior segment counts where it overlaps others: twice, as the pair loop of the code
    adds it as a source and as a target, or once, as the paper's weights have it.

    Raises:
        UsageError: fewer than two segments or more than MOST, an overlap that leaves no stride, a negative count, or
            repeats that are not one number above 0 for each prompt.
    """

    prompts: int
    length: int
    overlap: int
    transitions: int
    repeats: tuple[int, ...] = ()
    variant: Variant = "code"

    def __post_init__(self) -> None:
        if self.prompts < 1 or (self.prompts == 1 and sum(self.repeats) < 2):
            raise UsageError(
                f"DiTCtrl must have at least two prompts, or one that is shown for several segments. Got "
                f"{self.prompts}. Add the prompt the video turns to, say segments.times=3 for a longer video of one "
                "prompt, or use `mmdit record`."
            )
        if not 0 <= self.overlap < self.length:
            raise UsageError(
                f"The overlap must be at least 0 and shorter than a segment of {self.length} latent frames. Got "
                f"{self.overlap}. Take {min(round(9 * self.length / 13), self.length - 1)}."
            )
        if self.transitions < 0:
            raise UsageError(
                f"The number of transition segments must be at least 0. Got {self.transitions}. Take 1 or 2."
            )
        if self._asked > MOST:
            raise UsageError(
                f"A story must have at most {MOST} segments. Got {self._asked}. Shorten the durations, or take fewer "
                "transition segments."
            )
        if self.repeats and (len(self.repeats) != self.prompts or min(self.repeats) < 1):
            raise UsageError(
                f"Repeats must be one whole number from 1 on for each of the {self.prompts} prompts. Got "
                f"{list(self.repeats)}. Leave them out for one segment each."
            )

    @classmethod
    def scaled(
        cls,
        prompts: int,
        length: int,
        transitions: int | None = None,
        overlap: int | None = None,
        variant: Variant = "code",
        repeats: tuple[int, ...] = (),
    ) -> Segments:
        """The authors' geometry carried over to another segment length.

        Their presets for 13 latent frames are overlap 9 with 2 transition segments (the code's default) and 6 with 1
        (the paper's numbers) or none: round(9 T / 13) and round(6 T / 13).
        """
        if transitions is None:
            transitions = TRANSITIONS[variant]
        share = 9 if transitions >= 2 else 6
        auto = min(round(share * length / 13), length - 1)
        return cls(prompts, length, auto if overlap is None else overlap, transitions, repeats, variant)

    @classmethod
    def alone(cls, times: int, transitions: int) -> tuple[int, ...]:
        """Repeats of a single prompt that stands `times` times in the authors' list (AR:344-350): the transitions
        between equal prompts show it too.
        """
        return (times + (times - 1) * transitions,)

    @property
    def stride(self) -> int:
        """Latent frames from one start to the next."""
        return self.length - self.overlap

    def middle(self, more: int) -> Segments:
        """The same with `more` further segments of every prompt but the first and the last (SV:255-307)."""
        if not more:
            return self
        inner = (1 + more,) * (self.prompts - 2)
        return replace(self, repeats=(1, *inner, 1))

    @property
    def count(self) -> int:
        """S = n + b (n - 1), and what prompts have beyond one segment."""
        return len(self._shown)

    @property
    def frames(self) -> int:
        """Latent frames of the long video, T + (S - 1) stride."""
        return self.length + (self.count - 1) * self.stride

    def pixel_frames(self, compression: int = 4) -> int:
        """Pixel frames of the long video."""
        return compression * (self.frames - 1) + 1

    def window(self, segment: int) -> slice:
        """The long latent's frames of a segment."""
        return slice(segment * self.stride, segment * self.stride + self.length)

    def condition(self, segment: int) -> tuple[int, float]:
        """(prompt i, a): the segment shows (1 - a) of prompt i and a of prompt i + 1; a = j / (b + 1) for transition
        j.
        """
        return self._shown[segment]

    def branch(self, segment: int, role: str, guided: bool = True) -> Branch:
        """A segment in a role."""
        prompt, mix = self.condition(segment)
        return Branch(prompt, segment, role, guided, mix)

    def previous_segment(self, target: Branch) -> Branch | None:
        """The source role of the segment before, of the same half of guidance; None for the first."""
        return self.branch(target.segment - 1, "source", target.guided) if target.segment else None

    def own(self, prompt: int) -> int:
        """The first segment that a prompt has to itself."""
        return self._shown.index((prompt, 0.0))

    def multiplicity(self, segment: int) -> int:
        """How often a segment counts. In the code's pair loop interior ones do as a source and as a target, the first
        and last once (SA:749-767); in the paper's formula each does once.
        """
        return 1 if self.variant == "paper" or self.ends(segment) else 2

    def ends(self, segment: int) -> bool:
        """Whether it is the first or the last one."""
        return segment in (0, self.count - 1)

    @property
    def _asked(self) -> int:
        """The number of segments, before any is made."""
        return (sum(self.repeats) if self.repeats else self.prompts) + self.transitions * (self.prompts - 1)

    @cached_property
    def _shown(self) -> tuple[tuple[int, float], ...]:
        """What each segment shows."""
        made: list[tuple[int, float]] = []
        for prompt, times in enumerate(self.repeats or (1,) * self.prompts):
            made += [(prompt, 0.0)] * times
            if prompt < self.prompts - 1:
                made += [(prompt, j / (self.transitions + 1)) for j in range(1, self.transitions + 1)]
        return tuple(made)
