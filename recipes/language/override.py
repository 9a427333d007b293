"""`--set key=value`: one value of a recipe from the command line. No torch."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from probe.errors import RecipeError
from recipes.language.parse_tree import Origin, Tree, read
from recipes.language.recipe import Output, Recipe, Sampler, Segments

_SECTIONS = {
    name: section
    for section, part in (("sampler", Sampler), ("segments", Segments), ("output", Output))
    for name in part.model_fields
}
"""Keys that may stand without their section."""


def applied(tree: Tree, overrides: Sequence[str]) -> Tree:
    """A recipe with "key=value" texts applied, in order. A key is a path with dots; a key of sampler, segments, output
    or variables may stand alone where no other has its name.

    Raises:
        RecipeError: not key=value, a place that is not there, or a value that is not YAML.
    """
    for text in overrides:
        key, equals, value = text.partition("=")
        path = key.strip().split(".")
        if not equals or not all(path):
            raise RecipeError(f"--set must be key=value. Got {text!r}. Write for example --set sampler.steps=50.")
        new = read(value, Origin(f"--set {key.strip()}", tree.origin.folder))
        tree = _put(tree, _whole(path, tree), 0, Tree(_without_lines(new), new.origin))
    return tree


def typed(tree: Tree) -> bool:
    """Whether a value was given with `--set`."""
    return tree.origin.name.startswith("--set ")


def _without_lines(tree: Tree) -> Any:
    """A command line has none."""
    return Tree.of(tree.plain, tree.origin).value


def _whole(path: list[str], tree: Tree) -> list[str]:
    """A short key with its section."""
    declared = tree.get("variables")
    variables = declared.keys if declared else ()
    if len(path) == 2 and path[0] == "variables" and path[1] not in variables:
        raise RecipeError(f"--set must name a variable of the recipe. Got {path[1]}.{_near(path[1], variables)}")
    if len(path) > 1 or path[0] in Recipe.model_fields:
        return path
    places = [[_SECTIONS[path[0]], *path]] if path[0] in _SECTIONS else []
    places += [["variables", *path]] if path[0] in variables else []
    if len(places) > 1:
        both = " or ".join(".".join(place) for place in places)
        raise RecipeError(f"--set must name one place. Got {path[0]}, which is {both}. Write the whole key.")
    if not places:
        known = (*_SECTIONS, *variables, *Recipe.model_fields)
        raise RecipeError(f"--set must name a key of the recipe. Got {path[0]}.{_near(path[0], known)}")
    return places[0]


def _near(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, 1)
    return f" Did you mean {near[0]}?" if near else f" There are: {', '.join(known) or 'none'}."


def _put(tree: Tree, path: list[str], depth: int, new: Tree) -> Tree:
    """A tree in which the value at a path, of which `depth` keys led here, is another."""
    if depth == len(path):
        return new
    key, where = path[depth], ".".join(path[: depth + 1])
    if isinstance(tree.value, list):
        if not key.isdecimal() or int(key) >= len(tree.value):
            there = f"0 to {len(tree.value) - 1}" if tree.value else "of which there are none"
            raise RecipeError(f"A list entry must be chosen by its number, {there}. Got {where}. Count from 0.")
        parts = list(tree.value)
        parts[int(key)] = _put(parts[int(key)], path, depth + 1, new)
        return Tree(parts, tree.origin, tree.line)
    if isinstance(tree.value, dict) or tree.value is None:
        own = tree.value or {}
        inner = own.get(key, Tree(None, new.origin))
        return Tree({**own, key: _put(inner, path, depth + 1, new)}, tree.origin, tree.line)
    raise RecipeError(
        f"--set must name a key inside a section. Got {'.'.join(path[:depth])}, which is a single value. Check "
        "`mmdit recipes show`."
    )
