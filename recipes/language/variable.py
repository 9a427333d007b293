"""Variables of a recipe: ${name} stands for a value that is given once, at the top or by --set. No torch."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any

from recipes.language.parse_tree import MOST_GROWN, Tree

_PLACE = re.compile(r"\$(\$?)\{([^{}]*)\}")
"""${name}; $${name} is the text ${name}."""


def filled(tree: Tree) -> Tree:
    """A recipe with its variables put in; `variables` itself stays. A value that is one ${name} takes the value as it
    is, a list for instance; inside of a text it becomes text.

    Raises:
        RecipeError: a variable that is not there, that refers to another, or that is no text or number inside a text.
    """
    given = tree.get("variables")
    values = given.value if given and isinstance(given.value, dict) else {}
    for name, value in values.items():
        _refuse_nested(name, value)
    if not isinstance(tree.value, dict):
        return tree
    parts = {key: part if key == "variables" else _fill(part, values) for key, part in tree.value.items()}
    return Tree(parts, tree.origin, tree.line)


def escaped(value: Any) -> Any:
    """Plain data in which every text stands for itself: ${name} becomes $${name}."""
    if isinstance(value, Mapping):
        return {key: part if key == "variables" else escaped(part) for key, part in value.items()}
    if isinstance(value, list):
        return [escaped(part) for part in value]
    return _PLACE.sub(lambda found: f"${found[0]}", value) if isinstance(value, str) else value


def _fill(tree: Tree, values: Mapping[str, Tree]) -> Tree:
    if isinstance(tree.value, dict):
        return Tree({key: _fill(part, values) for key, part in tree.value.items()}, tree.origin, tree.line)
    if isinstance(tree.value, list):
        return Tree([_fill(part, values) for part in tree.value], tree.origin, tree.line)
    if not isinstance(tree.value, str) or not (found := list(_PLACE.finditer(tree.value))):
        return tree
    if len(found) == 1 and found[0][0] == tree.value and not found[0][1]:
        return _value(found[0][2], tree, values).placed(tree)
    _refuse_long(tree, found, values)
    return Tree(_PLACE.sub(lambda place: _text(place, tree, values), tree.value), tree.origin, tree.line)


def _text(place: re.Match[str], tree: Tree, values: Mapping[str, Tree]) -> str:
    if place[1]:
        return place[0][1:]
    value = _value(place[2], tree, values).value
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise tree.error(
            f"a variable inside a text must be a text or a number. Got ${{{place[2]}}}, which is "
            f"{'nothing' if value is None else type(value).__name__}. Let the variable be the whole value."
        )
    return str(value)


def _value(name: str, tree: Tree, values: Mapping[str, Tree]) -> Tree:
    if name in values:
        return values[name]
    near = difflib.get_close_matches(name, values, 1)
    there = f"The variables are: {', '.join(values)}." if values else "Add it under variables."
    raise tree.error(f"a variable must be given. Got ${{{name}}}. {f'Did you mean {near[0]}?' if near else there}")


def _refuse_long(tree: Tree, found: list[re.Match[str]], values: Mapping[str, Tree]) -> None:
    """Before a text is made that would not fit."""
    length = len(tree.value) + sum(_value(place[2], tree, values).size for place in found if not place[1])
    if length > MOST_GROWN:
        raise tree.error(f"a text must stay under {MOST_GROWN:,} characters. Got {length:,}. Shorten its variables.")


def _refuse_nested(name: str, value: Tree) -> None:
    if isinstance(value.value, str) and _PLACE.search(value.value):
        raise value.error(f"a variable must not refer to another. Got {name}: {value.value}. Write its value.")
    for part in value.inner:
        _refuse_nested(name, part)
