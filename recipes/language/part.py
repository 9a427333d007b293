"""What every part of a recipe shares: its rules, and the kinds of values that occur everywhere. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

Auto = Literal["auto"]


class Part(BaseModel):
    """Common rules: unknown keys are errors, values never change, keys that are words of Python go by their alias."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_by_name=True,
        validate_by_alias=True,
        serialize_by_alias=True,
        ser_json_inf_nan="constants",
    )

    @model_validator(mode="before")
    @classmethod
    def _true_is_no_number(cls, data: Any) -> Any:
        """Python takes true for 1."""
        for name, field in cls.model_fields.items() if isinstance(data, Mapping) else ():
            key = field.alias if field.alias and field.alias in data else name
            if _has_bool(data.get(key)) and _takes_numbers_alone(cls, name):
                kind = PydanticCustomError("number", "must be a number, not true or false")
                raise ValidationError.from_exception_data(
                    cls.__name__, [{"type": kind, "loc": (key,), "input": data[key]}]
                )
        return data


def _has_bool(value: Any) -> bool:
    return isinstance(value, bool) or (isinstance(value, list | tuple) and any(map(_has_bool, value)))


@cache
def _takes_numbers_alone(part: type[BaseModel], name: str) -> bool:
    """Whether plain values of a field are numbers, and never true or false."""
    kinds = set(_plain(part.model_fields[name].annotation))
    return bool(kinds & {int, float}) and not kinds & {bool, Any}


def _plain(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) is Literal:
        yield from map(type, get_args(annotation))
        return
    inner = get_args(annotation)[: 1 if hasattr(annotation, "__metadata__") else None]
    for one in inner:
        yield from _plain(one)
    if not inner:
        yield annotation


def _not_empty(text: str) -> str:
    if not text.strip():
        raise ValueError("must have at least one word")
    return text


def _half_open(bounds: tuple[int, int]) -> tuple[int, int]:
    if not 0 <= bounds[0] < bounds[1]:
        raise ValueError("must be [start, stop) with 0 <= start < stop")
    return bounds


@dataclass(frozen=True)
class Marker:
    """Stands beside a type and says what its texts name: an area, a prompt."""

    what: str


PROMPT = Marker("prompt")
Text = Annotated[str, AfterValidator(_not_empty)]
Name = Annotated[str, Field(pattern=r"^\w[\w-]*$", max_length=64)]
PromptName = Annotated[str, PROMPT]
HalfOpen = Annotated[tuple[int, int], AfterValidator(_half_open)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]


def marked(part: type[BaseModel], name: str, marker: Marker) -> bool:
    """Whether texts of a field are names of what the marker says."""
    field = part.model_fields[name]
    return marker in field.metadata or _holds(field.annotation, marker)


def _holds(annotation: Any, marker: Marker) -> bool:
    """Down to the next part: that one's fields speak for themselves."""
    beside = getattr(annotation, "__metadata__", ())
    return marker in beside or any(_holds(inner, marker) for inner in get_args(annotation)[: 1 if beside else None])


class _Known(dict[str, Any]):
    """The context of an error; a type that is joined with others must have a hash."""

    def __hash__(self) -> int:
        return hash(tuple(self))


def by_form(must: str, plain: Mapping[type, str], keys: Mapping[str, str]) -> Discriminator:
    """How to tell the forms of a value apart: by the python type of a plain value, or by a key of a mapping. Both map
    to the tag of the form, for a part the name of its class. `must` is what the value must be, for the error.
    """

    def tag(value: Any) -> str | None:
        if isinstance(value, BaseModel):
            return type(value).__name__
        if isinstance(value, Mapping) and keys:
            return next((keys[key] for key in value if key in keys), None)
        return next((form for kind, form in plain.items() if type(value) is kind), None)

    known = _Known(known=list(keys))
    return Discriminator(tag, custom_error_type="form", custom_error_message=must, custom_error_context=known)
