"""Areas of tokens and the masks they are made of, as recipes write them. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal, Self

from pydantic import Field, Tag, model_validator

from recipes.language.part import HalfOpen, Marker, Part, PromptName, Text, by_form
from recipes.language.span import Span

AREA = Marker("area")
PLAIN = ("video", "text", "prompt_text", "padding")
"""Areas that every model has: all video tokens, all text tokens, those of the prompt itself, those behind its end."""


class _Phrases(Part):
    word: Text | None = Field(default=None, description="a word or phrase of the prompt; circle#2 is the second circle")
    words: list[Text] | None = Field(default=None, min_length=1, description="several of them")

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.word is None) == (self.words is None):
            raise ValueError("must have either word or words")
        return self

    @property
    def phrases(self) -> tuple[str, ...]:
        """The words and phrases."""
        return (self.word,) if self.word is not None else tuple(self.words or ())


class Words(_Phrases):
    """The text tokens of words of the prompt; none in the unconditional half, unless it takes the same places there."""

    both_halves: bool = Field(default=False, description="the same places in the unconditional half as well")


class Frames(Part):
    """Token frames of the video."""

    frames: HalfOpen = Field(description="half-open, counted in token frames")


class Box(Part):
    """A rectangle of patches in every frame."""

    box: tuple[int, int, int, int] = Field(description="[top, left, bottom, right] in patches, half-open")

    @model_validator(mode="after")
    def _ordered(self) -> Box:
        top, left, bottom, right = self.box
        if not (0 <= top < bottom and 0 <= left < right):
            raise ValueError("must be [top, left, bottom, right] with 0 <= top < bottom and 0 <= left < right")
        return self


class SinkRule(Part):
    """Which tokens are sinks: keys that take far more than their share of a call's attention."""

    threshold: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        default=10.0, description="lift from which a token is a sink; 1 is an even share"
    )
    tokens: Literal["video", "text", "all"] = Field(default="video", description="among which tokens")
    heads: Span = Field(default=None, description="heads whose mean attention is looked at; null: all")


class Sinks(Part):
    """The sinks of each call, found while it runs."""

    sinks: SinkRule


class Not(Part):
    """The rest: the video outside of an area of the video, the tokens outside of any other."""

    area: Area = Field(alias="not", description="what is left out")


class All(Part):
    """Inside of every one."""

    all: list[Area] = Field(min_length=1, description="areas that overlap")


class AnyOf(Part):
    """Inside of at least one."""

    any: list[Area] = Field(min_length=1, description="areas that are joined")


Area = Annotated[
    Annotated[Text, Tag("name")]
    | Annotated[Words, Tag("Words")]
    | Annotated[Frames, Tag("Frames")]
    | Annotated[Box, Tag("Box")]
    | Annotated[Sinks, Tag("Sinks")]
    | Annotated[Not, Tag("Not")]
    | Annotated[All, Tag("All")]
    | Annotated[AnyOf, Tag("AnyOf")],
    by_form(
        f"must be {', '.join(PLAIN)}, the name of a mask, or a mapping such as {{word: circle}}",
        {str: "name"},
        {"word": "Words", "words": "Words", "frames": "Frames", "box": "Box", "sinks": "Sinks"}
        | {"not": "Not", "all": "All", "any": "AnyOf"},
    ),
    AREA,
]
"""A set of tokens: a name of PLAIN or of a mask, or one of the mappings."""

for _part in (Not, All, AnyOf):
    _part.model_rebuild()


class WordMask(_Phrases):
    """Where words are, found by their attention maps while the model runs."""

    prompt: PromptName | None = Field(
        default=None, description="name of the prompt whose branch is measured; null: the first"
    )
    direction: Literal["vt", "tv", "mean"] = Field(
        default="vt", description="vt: video looks at the words; tv: back; mean: of both"
    )
    probabilities: Literal["joint", "text", "video"] = Field(
        default="joint", description="joint: of the whole softmax; text, video: among these columns alone"
    )
    layers: Span = Field(default=None, description="layers that are averaged")
    steps: Span = Field(default=None, description="steps that are averaged; each use takes those before it")
    blur: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(default=0.0, description="Gaussian, in patches")
    normalise: Literal["frame", "clip"] = Field(default="clip", description="what is brought to 0 to 1 before the cut")
    threshold: Annotated[float, Field(ge=0, le=1)] | Literal["otsu"] = Field(
        default="otsu", description="inside above it; otsu: chosen by the map"
    )
    top: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None, description="share of the patches inside, in place of a threshold"
    )
    largest: bool = Field(default=False, description="keep the largest part, connected in time")
    soft: bool = Field(default=False, description="no cut: weights in 0 to 1, for gates")
    propagate: Annotated[int, Field(ge=0, le=8)] = Field(
        default=0, description="power of the video's own attention that spreads the map first"
    )
    rivals: list[Text] = Field(
        default_factory=list, description="other words of the prompt; inside is where they are weaker"
    )
    outputs_of: PromptName | None = Field(
        default=None,
        description="name of the prompt in whose video the words and rivals are found by attention outputs "
        "(ConceptAttention); null: by attention maps of their own",
    )

    @model_validator(mode="after")
    def _one_cut(self) -> WordMask:
        if self.top is not None and "threshold" in self.model_fields_set and self.threshold != "otsu":
            raise ValueError("must have either threshold or top")
        if self.probabilities not in ("joint", {"vt": "text", "tv": "video"}.get(self.direction)):
            raise ValueError("must have joint probabilities, or text with direction vt, or video with direction tv")
        if self.outputs_of is not None and (self.propagate or self.direction != "vt" or not self.rivals):
            raise ValueError("must have rivals, and neither direction nor propagate, with outputs_of")
        return self


class FileMask(Part):
    """A mask from a file in the recipe's folder; what it holds is kept in `values` once the recipe is loaded."""

    file: Text | None = Field(
        default=None, description="npz (array mask [frames, rows, columns] on the token grid) or png (white is inside)"
    )
    values: str | None = Field(default=None, description="what the file holds, filled in when a recipe is loaded")

    @model_validator(mode="after")
    def _some(self) -> FileMask:
        if self.file is None and self.values is None:
            raise ValueError("must name a file")
        return self


Mask = Annotated[
    Annotated[WordMask, Tag("WordMask")]
    | Annotated[FileMask, Tag("FileMask")]
    | Annotated[Frames, Tag("Frames")]
    | Annotated[Box, Tag("Box")],
    by_form(
        "must be a mapping with word, words, file, box or frames",
        {},
        {"word": "WordMask", "words": "WordMask", "file": "FileMask", "values": "FileMask"}
        | {"box": "Box", "frames": "Frames"},
    ),
]
"""A named set of video tokens."""


def within(area: Area | None) -> Iterator[Area]:
    """An area and all that it is made of."""
    if area is None:
        return
    yield area
    parts = area.all if isinstance(area, All) else area.any if isinstance(area, AnyOf) else []
    for part in [area.area] if isinstance(area, Not) else parts:
        yield from within(part)
