"""What all operators of a recipe share: where they act, on which tokens, and how much. No torch."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from recipes.language.area import Area
from recipes.language.part import Part, PromptName
from recipes.language.span import Only, Span, Strength

Kind = Literal["joint", "double", "single", "self", "cross"]
Head = tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]]


class Operation(Part):
    """Where, which tokens, and how much: what all operators share."""

    op: str
    steps: Span = Field(default=None, description="denoising steps, 0 is pure noise; null: all")
    layers: Span = Field(default=None, description="blocks of the model; null: all")
    heads: Span = Field(default=None, description="heads; null: all")
    places: list[Head] | None = Field(
        default=None, min_length=1, description="single heads as [layer, head], in place of layers and heads"
    )
    kinds: list[Kind] | None = Field(default=None, min_length=1, description="kinds of attention; null: all")
    prompts: list[PromptName] | None = Field(
        default=None, min_length=1, description="names of the prompts whose branches are changed; null: all"
    )
    guidance: Literal["both", "conditional", "unconditional"] = Field(
        default="both", description="which half of classifier-free guidance is changed"
    )
    rows: Area | None = Field(default=None, description="tokens that are changed; null: all the operator works on")
    strength: Strength = Field(default=1.0, description="0: nothing changes; 1: all of it; or a ramp over the steps")

    @model_validator(mode="after")
    def _placed_once(self) -> Self:
        if self.places is not None and (self.layers, self.heads) != (None, None):
            raise ValueError("must have either places or layers and heads")
        return self

    def by_layer(self) -> list[Self]:
        """The same as edits of one layer each, where it names places: one with all its heads there."""
        if self.places is None:
            return [self]
        heads: dict[int, set[int]] = {}
        for layer, head in self.places:
            heads.setdefault(layer, set()).add(head)
        return [
            self.model_copy(update={"places": None, "layers": layer, "heads": Only(only=sorted(heads[layer]))})
            for layer in sorted(heads)
        ]
