"""How a long latent is cut into overlapping segments, and which prompts each segment shows. Numbers only, no torch."""

from __future__ import annotations

from dataclasses import dataclass

from probe.errors import UsageError


@dataclass(frozen=True)
class Segments:
    """n prompts, `length` latent frames per segment, `overlap` of them shared with the next, `transitions`
    interpolated segments per gap.

    Source: SV:217-312. Without their "longer middle segments".

    Raises:
        UsageError: fewer than two prompts, an overlap that leaves no stride, or a negative count.
    """

    prompts: int
    length: int
    overlap: int
    transitions: int

    def __post_init__(self) -> None:
        if self.prompts < 2:
            raise UsageError(
                f"DiTCtrl must have at least two prompts. Got {self.prompts}. Add the prompt the video turns to, or "
                "use `mmdit record`."
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

    @classmethod
    def scaled(cls, prompts: int, length: int, transitions: int = 2, overlap: int | None = None) -> Segments:
        """The authors' geometry carried over to another segment length.

        Their presets for 13 latent frames are overlap 9 with 2 transition segments and 6 with 1 (or none): round(9 T
        / 13) and round(6 T / 13).
        """
        share = 9 if transitions >= 2 else 6
        auto = min(round(share * length / 13), length - 1)
        return cls(prompts, length, auto if overlap is None else overlap, transitions)

    @property
    def stride(self) -> int:
        """Latent frames from one start to the next."""
        return self.length - self.overlap

    @property
    def count(self) -> int:
        """S = n + b (n - 1)."""
        return self.prompts + self.transitions * (self.prompts - 1)

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
        prompt, j = divmod(segment, self.transitions + 1)
        return prompt, j / (self.transitions + 1)

    def multiplicity(self, segment: int) -> int:
        """How often the pair loop counts a segment: interior ones as a source and as a target, the first and last
        once (SA:749-767).
        """
        return 1 if segment in (0, self.count - 1) else 2
