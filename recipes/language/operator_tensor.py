"""Operators on tensors of the attention: q, k and v before it, its output, the output of the block. No torch."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, Tag, model_validator

from recipes.language.area import Area
from recipes.language.operation import Operation
from recipes.language.part import Count, Number, Part, PromptName, Share, Text, by_form
from recipes.language.source import PREVIOUS, Rows, Source
from recipes.language.span import AutoSpan

Axis = Literal["frame", "row", "column"]


def _each_once(tensors: str) -> str:
    if not tensors or set(tensors) - set("qkvo") or len(set(tensors)) < len(tensors):
        raise ValueError("must be some of q, k, v, o, each once")
    return tensors


Phrases = Annotated[
    Annotated[Text, Tag("text")]
    | Annotated[
        list[
            Annotated[
                Annotated[Text, Tag("text")] | Annotated[tuple[Text, Text], Tag("pair")],
                by_form("must be a phrase, or two of them", {str: "text", list: "pair", tuple: "pair"}, {}),
            ]
        ],
        Tag("list"),
    ],
    by_form(
        "must be a phrase, a list with one for each prompt, or a list of pairs, one for each turn",
        {str: "text", list: "list", tuple: "list"},
        {},
    ),
]


class Transfer(Operation):
    """Rows take tensors of a source: with kv, keys and values are shared (MasaCtrl, DiTCtrl); with qk the map goes
    over (2504.10317); with qkv the content as well (ConsistEdit).
    """

    op: Literal["transfer"] = "transfer"
    steps: AutoSpan = Field(default=None, description="null: all; auto: those of DiTCtrl")
    layers: AutoSpan = Field(default=None, description="null: all; auto: those of DiTCtrl")
    objects: Phrases | None = Field(
        default=None,
        description="how the prompts call an object: it looks at the source's object alone, the rest at the rest "
        "(DiTCtrl's mask-guided sharing)",
    )
    threshold: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.3, description="of the map of objects, each frame of it brought to 0 to 1"
    )
    tensors: Annotated[str, AfterValidator(_each_once)] = Field(
        default="kv", description="which of q, k, v, o, each once"
    )
    source: Source = Field(description="the name of a prompt, previous_segment (DiTCtrl), or a mapping")
    gate: Area | None = Field(default=None, description="soft weights per row on top of the strength; null: 1")
    mapping: Rows | None = Field(default=None, description="which row each row takes; null: the same one")
    positions: Literal["source", "target"] = Field(
        default="source", description="target: keys that move are rotated to their new place"
    )

    @model_validator(mode="after")
    def _fits_its_source(self) -> Self:
        if self.source == PREVIOUS and (self.prompts is not None or self.guidance != "both"):
            raise ValueError("must be for all prompts and both halves with previous_segment")
        if self.source == PREVIOUS and self.places is not None:
            raise ValueError("must have heads in place of places with previous_segment, whose layers are DiTCtrl's")
        moved = self.mapping is not None
        unused = {"mapping": self.mapping, "positions": self.positions == "target", "kinds": self.kinds}
        for name, given in unused.items():
            if self.source == PREVIOUS and given not in (None, False):
                raise ValueError(f"must have no {name} with previous_segment")
        if self.objects is not None and (not isinstance(self.source, str) or self.tensors != "kv" or moved):
            raise ValueError("must have objects with kv of a prompt or of previous_segment, without a mapping")
        if self.objects is not None and (self.rows is not None or self.gate is not None or self.strength != 1):
            raise ValueError("must have objects without rows, gate and strength: all of the keys are shared")
        if self.source == PREVIOUS and "o" in self.tensors and self.tensors != "o":
            raise ValueError("must have o by itself with previous_segment")
        if "objects" not in self.model_fields_set and "threshold" in self.model_fields_set:
            raise ValueError("must have a threshold for objects only")
        return self


class Extend(Operation):
    """Rows look at keys and values of a source as well as at their own."""

    op: Literal["extend"] = "extend"
    source: Source = Field(description="the name of a prompt, or a mapping")
    columns: Area = Field(default="video", description="which tokens of the source are added")
    bias: Number = Field(default=0.0, description="added to their logits; log c multiplies their odds by c")
    pool: tuple[Count, Count, Count] | None = Field(
        default=None, description="average over blocks of [frames, rows, columns] before they are added"
    )


class Scale(Operation):
    """A tensor times a factor: of o, ablation (0) and routing of heads."""

    op: Literal["scale"] = "scale"
    tensor: Literal["q", "k", "v", "o"] = Field(description="o is the output of the heads")
    factor: Number = Field(description="1: as it was")


class Rotate(Operation):
    """Another position in RoPE."""

    op: Literal["rotate"] = "rotate"
    tensors: Literal["q", "k", "qk"] = Field(default="k", description="what is rotated")
    shift: tuple[Number, Number, Number] | None = Field(default=None, description="[frames, rows, columns] in tokens")
    drop: bool = Field(default=False, description="no position at all")
    axes: list[Axis] = Field(default=["frame", "row", "column"], min_length=1, description="which axes")
    band: tuple[Share, Share] | None = Field(
        default=None, description="which share of the frequencies of an axis, 0 the fastest"
    )

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.shift is None) != self.drop:
            raise ValueError("must have either shift or drop")
        if self.band is not None and (self.band[0] >= self.band[1] or (self.band[0] > 0 and self.band[1] < 1)):
            raise ValueError("must have a band that starts at 0, the fastest, or stops at 1, the slowest")
        return self


class Direction(Part):
    """The difference of two prompts' means in the same call: what points from one to the other."""

    source: PromptName = Field(alias="from", description="name of a prompt")
    target: PromptName = Field(alias="to", description="name of a prompt")


class Shift(Operation):
    """A direction added to the attention's output: O <- O + strength * direction."""

    op: Literal["shift"] = "shift"
    tensor: Literal["o"] = Field(default="o", description="o: attention output")
    direction: Direction
    keep_norm: bool = Field(default=False, description="bring each row back to its length")


class Filter(Operation):
    """Frequencies of the video rows, through a Gaussian low pass: gains below and above the cutoff."""

    op: Literal["filter"] = "filter"
    tensor: Literal["o", "h"] = Field(default="o", description="o: attention output; h: output of the block")
    axes: list[Axis] = Field(default=["frame", "row", "column"], min_length=1, description="which axes")
    cutoff: Annotated[float, Field(gt=0, le=1)] = Field(description="1 is the highest frequency")
    low: Number = Field(default=1.0, description="gain below the cutoff")
    high: Number = Field(default=0.0, description="gain above the cutoff")

    @model_validator(mode="after")
    def _one_side(self) -> Self:
        if 1 not in (self.low, self.high):
            raise ValueError("must leave one side as it is, low or high 1")
        return self
