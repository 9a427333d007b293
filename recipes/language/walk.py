"""The parts of a recipe, one inside of the other, with their paths. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from recipes.language.area import Words
from recipes.language.operator import Operation
from recipes.language.part import Marker, marked

Path = tuple[str | int, ...]


def parts(value: Any, kind: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """All parts of a kind in a value, with their paths; parts inside of parts as well."""
    if isinstance(value, kind):
        yield path, value
    for key, inner in _inner(value):
        if not (kind is Words and isinstance(inner, Operation)):  # words belong to the operator they stand in
            yield from parts(inner, kind, (*path, key))


def _inner(value: Any) -> Iterator[tuple[str | int, Any]]:
    if isinstance(value, BaseModel):
        for name, field in type(value).model_fields.items():
            yield field.alias or name, getattr(value, name)
    elif isinstance(value, dict):
        yield from value.items()
    elif isinstance(value, list | tuple):
        yield from enumerate(value)


def marked_names(recipe: BaseModel, marker: Marker) -> Iterator[tuple[Path, str]]:
    """The names of areas or prompts in a recipe, with their paths."""
    for path, part in parts(recipe, BaseModel):
        for name, field in type(part).model_fields.items():
            if marked(type(part), name, marker):
                value, place = getattr(part, name), (*path, field.alias or name)
                for key, one in enumerate(value) if isinstance(value, list) else [(None, value)]:
                    if isinstance(one, str):
                        yield place if key is None else (*place, key), one
