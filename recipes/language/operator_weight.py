"""Operators on the weights of the attention: which columns a row looks at, and how much. No torch."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from recipes.language.area import Area
from recipes.language.operation import Operation
from recipes.language.part import Count, Number, Part, Share


def _below_infinity(value: float) -> float:
    if not value < float("inf"):
        raise ValueError("must be finite, or -.inf to hide")
    return value


Logit = Annotated[float, AfterValidator(_below_infinity)]


class Bias(Operation):
    """A number on the logits of rows x columns."""

    op: Literal["bias"] = "bias"
    amount: Logit = Field(description="added to the logits; -.inf hides the columns")
    columns: Area | None = Field(default=None, description="tokens that are looked at; null: all")


class Table(Operation):
    """A table of biases between groups of tokens (LAMIC)."""

    op: Literal["table"] = "table"
    groups: list[Area] = Field(min_length=1, description="groups of tokens; what is in none is not changed")
    values: list[list[Logit]] = Field(description="bias of each row group on each column group; -.inf hides")

    @model_validator(mode="after")
    def _square(self) -> Self:
        n = len(self.groups)
        if len(self.values) != n or any(len(row) != n for row in self.values):
            raise ValueError(f"must have {n} rows of {n} values, one per group")
        return self


class Subject(Part):
    """One subject of a layout: what the prompt says of it, and where it belongs."""

    text: Area = Field(description="its words")
    region: Area = Field(description="its place in the video")
    reference: Area | None = Field(default=None, description="what shows it already, such as frames; null: nothing")


class Lamic(Operation):
    """Subjects apart: the words and the region of each see each other and not those of the others (LAMIC)."""

    op: Literal["lamic"] = "lamic"
    subjects: list[Subject] = Field(min_length=1, description="words, region and reference of each subject")
    switch: Share = Field(default=0.05, description="share of the steps after which regions and the rest may meet")

    @model_validator(mode="after")
    def _stages(self) -> Self:
        if self.steps is not None or self.rows is not None:
            raise ValueError("must have neither steps nor rows; its stages and its subjects set them")
        return self


class Window(Operation):
    """Video rows see only video columns nearby (CLEAR, Sparse-VideoGen); text stays visible."""

    op: Literal["window"] = "window"
    frames: Annotated[int, Field(ge=0)] | None = Field(default=None, description="frames to either side")
    radius: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        default=None, description="patches to either side, within a frame"
    )
    shape: Literal["circle", "square"] = Field(default="circle", description="what a radius means")
    band: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        default=None, description="width of a band along the sequence, in frames of tokens"
    )
    order: Literal["frame", "token", "best", "worst"] = Field(
        default="frame",
        description="a band counts frame by frame, or place by place (token); best: in each call and head what gives "
        "the output back on sampled rows (Sparse-VideoGen); worst: the other one",
    )

    @model_validator(mode="after")
    def _some(self) -> Self:
        if self.frames is None and self.radius is None and self.band is None:
            raise ValueError("must have frames, radius or band")
        if self.band is None and self.order != "frame":
            raise ValueError("must have a band whose order is chosen")
        return self


class Reweight(Operation):
    """More or less attention to columns. raw multiplies the weights (prompt-to-prompt); renormalised keeps rows at sum
    1; redistributed gives what is freed to other columns (VAR).
    """

    op: Literal["reweight"] = "reweight"
    columns: Area = Field(description="tokens that are looked at")
    factor: Number = Field(description="1: as it was; 0: none; below 0 (raw alone): its values are taken away")
    mode: Literal["raw", "renormalised", "redistributed"] = Field(
        default="renormalised", description="what becomes of the other columns"
    )
    to: Area | None = Field(default=None, description="columns that take what is freed; null: all others")

    @model_validator(mode="after")
    def _to(self) -> Self:
        if self.to is not None and self.mode != "redistributed":
            raise ValueError("must have mode redistributed where it says to")
        if self.factor < 0 and self.mode != "raw":
            raise ValueError("must have a factor of 0 or more, or mode raw")
        return self


class Temper(Operation):
    """Sharper (above 1) or flatter rows."""

    op: Literal["temper"] = "temper"
    factor: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(description="logits times this; 1: as it was")


class Sparsify(Operation):
    """Each row keeps its largest weights only (2504.10317); exact, and slow."""

    op: Literal["sparsify"] = "sparsify"
    keep: Annotated[float, Field(gt=0, le=1)] = Field(description="share of the keys; 1: as it was")
    renormalise: bool = Field(default=True, description="rows keep their sum of 1; false: the others become 0")


class Reuse(Operation):
    """Sparse attention with the mass and the rest of a full step reused (Re-ttention)."""

    op: Literal["reuse"] = "reuse"
    every: Count = Field(default=5, description="every nth step is full")
    window: Share = Field(default=0.03125, description="share of a frame that is seen, the same in every frame")
    drift: Annotated[float, Field(ge=0, le=1)] = Field(default=0.04, description="added to the kept mass each step")


class Identity(Operation):
    """Rows toward looking at themselves only (PAG). text_visible: video rows keep seeing text; whole: every row, text
    too, O = V; mass: the video's share of a row goes to the row itself.
    """

    op: Literal["identity"] = "identity"
    form: Literal["text_visible", "whole", "mass"] = Field(
        default="text_visible", description="which of the three things papers call PAG"
    )

    @model_validator(mode="after")
    def _rows(self) -> Self:
        if self.rows is not None and self.form != "whole":
            raise ValueError("must have rows with form whole only; the others are of all video rows")
        return self


class Seg(Operation):
    """Queries become their mean, or a blur of them (SEG)."""

    op: Literal["seg"] = "seg"
    over: Literal["video", "text", "all"] = Field(default="video", description="rows that share their mean")
    sigma: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        default=None, description="of a Gaussian blur over the video, in tokens; null: the mean"
    )

    @model_validator(mode="after")
    def _has_a_grid(self) -> Self:
        if self.sigma is not None and self.over != "video":
            raise ValueError("must be over video with a sigma; text has no grid to blur over")
        return self
