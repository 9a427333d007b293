"""Spans of steps, layers and heads, and strengths over the steps, as recipes write them. No torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Tag, model_validator

from probe.errors import UsageError
from recipes.language.part import Auto, Count, HalfOpen, Number, Part, Share, by_form


class Only(Part):
    """Just these."""

    only: list[Annotated[int, Field(ge=0)]] = Field(min_length=1, description="indices, counted from 0")


class Progress(Part):
    """A share of the whole: index k of n is inside where start <= k / n < stop."""

    progress: tuple[Share, Share] = Field(description="[start, stop), shares of the whole; 0 is pure noise for steps")

    @model_validator(mode="after")
    def _ordered(self) -> Progress:
        if self.progress[0] >= self.progress[1]:
            raise ValueError("must be [start, stop) with 0 <= start < stop <= 1")
        return self


class First(Part):
    """The first few."""

    first: Count = Field(description="how many from the start")


class Last(Part):
    """The last few."""

    last: Count = Field(description="how many from the end")


class Every(Part):
    """Every nth."""

    every: Count = Field(description="distance from one to the next")
    start: Annotated[int, Field(ge=0)] = Field(default=0, alias="from", description="the first of them")


_Form = (
    Annotated[None, Tag("null")]
    | Annotated[int, Field(ge=0), Tag("int")]
    | Annotated[HalfOpen, Tag("bounds")]
    | Annotated[Only, Tag("Only")]
    | Annotated[Progress, Tag("Progress")]
    | Annotated[First, Tag("First")]
    | Annotated[Last, Tag("Last")]
    | Annotated[Every, Tag("Every")]
)
_MUST = "must be an index, [start, stop), {only: [...]}, {progress: [start, stop]}, {first: n}, {last: n} or {every: n}"
_PLAIN = {type(None): "null", int: "int", list: "bounds", tuple: "bounds"}
_KEYS = {"only": "Only", "progress": "Progress", "first": "First", "last": "Last", "every": "Every", "from": "Every"}

Span = Annotated[_Form, by_form(_MUST, _PLAIN, _KEYS)]
"""null: all; 3: one; [2, 5]: 2, 3, 4; or one of the mappings."""

AutoSpan = Annotated[_Form | Annotated[Auto, Tag("auto")], by_form(_MUST, {**_PLAIN, str: "auto"}, _KEYS)]
"""A span, or auto: what the method at hand chooses."""


def chosen(span: Span, n: int, name: str, what: str) -> tuple[int, ...]:
    """The indices of a span among n, ascending. `name` is its place in the recipe and `what` is counted, for the error:
    "edits.0.layers", "layers".

    Raises:
        UsageError: it reaches past n, or chooses none.
    """
    top = _top(span)
    if top > n:
        raise UsageError(f"{name} must lie within [0, {n}), the {what} of this run. Got {_said(span)}. Lower its end.")
    found = tuple(k for k in range(n) if _inside(span, k, n))
    if not found:
        raise UsageError(f"{name} must choose some of the {n} {what} of this run. Got {_said(span)}. Widen it.")
    return found


def _top(span: Span) -> int:
    match span:
        case int():
            return span + 1
        case (_, stop):
            return stop
        case Only():
            return max(span.only) + 1
        case First():
            return span.first
        case Last():
            return span.last
        case Every():
            return span.start + 1
    return 0


def _inside(span: Span, k: int, n: int) -> bool:
    match span:
        case int():
            return k == span
        case (start, stop):
            return start <= k < stop
        case Only():
            return k in span.only
        case Progress(progress=(start, stop)):
            return start <= k / n < stop
        case First():
            return k < span.first
        case Last():
            return k >= n - span.last
        case Every():
            return k >= span.start and (k - span.start) % span.every == 0
    return True


def _said(span: Span) -> str:
    plain = span.model_dump() if isinstance(span, Part) else list(span) if isinstance(span, tuple) else span
    return str(plain)


class Ramp(Part):
    """A strength that changes with the progress k / K of step k of K, constant before `start` and after `stop`."""

    first: Number = Field(alias="from", description="the strength up to start")
    last: Number = Field(alias="to", description="the strength from stop on")
    start: Share = Field(default=0.0, description="progress where it begins to change")
    stop: Share = Field(default=1.0, description="progress where it is done")
    shape: Literal["linear", "cosine", "step"] = Field(default="linear", description="the way from first to last")

    @model_validator(mode="after")
    def _ordered(self) -> Ramp:
        if self.start > self.stop:
            raise ValueError("must have start <= stop")
        return self


Strength = Annotated[
    Annotated[Number, Tag("number")] | Annotated[Ramp, Tag("Ramp")],
    by_form(
        "must be a number or {from: a, to: b, start: 0, stop: 1, shape: linear}",
        {int: "number", float: "number", str: "number"},
        dict.fromkeys(("from", "to", "start", "stop", "shape"), "Ramp"),
    ),
]
"""How much of an edit is applied: 0 is none of it, 1 all of it."""
