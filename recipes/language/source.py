"""Where a transfer takes from, and which row of it, as recipes write them. No torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Tag

from recipes.language.part import Part, PromptName, by_form


class Itself(Part):
    """The branch itself, at other rows: with a mapping."""

    itself: Literal[True]


class Constant(Part):
    """A constant in place of a branch."""

    constant: Literal["mean", "zero"] = Field(description="mean over the rows of the branch itself, or zero")


class StoredAt(Part):
    """Where in the run a tensor was kept."""

    prompt: PromptName | None = Field(default=None, description="name of its prompt; null: the same branch")
    step: Annotated[int, Field(ge=0)] | None = Field(default=None, description="null: the same step")
    layer: Annotated[int, Field(ge=0)] | None = Field(default=None, description="null: the same layer")


class Stored(Part):
    """A tensor of an earlier step or another layer of this run."""

    stored: StoredAt


PREVIOUS = "previous_segment"

Source = Annotated[
    Annotated[PromptName, Tag("name")]
    | Annotated[Itself, Tag("Itself")]
    | Annotated[Constant, Tag("Constant")]
    | Annotated[Stored, Tag("Stored")],
    by_form(
        "must be the name of a prompt, previous_segment, {itself: true}, {constant: mean} or {stored: {step: 3}}",
        {str: "name"},
        {"itself": "Itself", "constant": "Constant", "stored": "Stored"},
    ),
]
"""Where tensors come from; a name is a prompt's, and previous_segment the segment before (DiTCtrl)."""


class MatchRule(Part):
    """Each row takes the most similar row of the source, by the cosine of their features."""

    features: Literal["q", "k", "v", "o"] = Field(default="k", description="what is compared")
    threshold: Annotated[float, Field(ge=-1, le=1)] = Field(default=0.5, description="rows below it stay as they are")


class Matched(Part):
    """By similarity."""

    match: MatchRule


class Moved(Part):
    """By place: a row takes the row of the source that lies `move` further."""

    move: tuple[int, int, int] = Field(description="[frames, rows, columns] in tokens")


Rows = Annotated[
    Annotated[Matched, Tag("Matched")]
    | Annotated[Moved, Tag("Moved")]
    | Annotated[list[Annotated[int, Field(ge=0)]], Tag("index")],
    by_form(
        "must be {match: {features: k}}, {move: [frames, rows, columns]} or a list with one source row per row",
        {list: "index", tuple: "index"},
        {"match": "Matched", "move": "Moved"},
    ),
]
"""Which row of the source each row takes; the same row by default."""
