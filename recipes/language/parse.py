"""YAML to recipes and back. Errors say the file and line, the place in the recipe, and the nearest known key. No torch.

Only `recipes.language.parse` and `recipes.language.parse_tree` know of YAML.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from pydantic import ValidationError

from recipes.language.include import find, names, text_of, tree_of
from recipes.language.maskvalues import kept
from recipes.language.override import applied
from recipes.language.parse_error import error_of
from recipes.language.parse_tree import Origin, Tree
from recipes.language.recipe import Recipe
from recipes.language.variable import escaped, filled
from recipes.language.videofile import located

__all__ = ["dump", "find", "load", "names", "text_of", "validate"]


def load(recipe: str, overrides: Sequence[str] = (), values: Mapping[str, Any] | None = None) -> Recipe:
    """Read and validate a recipe.

    `overrides` are "key=value" texts with dotted keys (`sampler.steps=50`; `steps=50` for short), `values` whole
    top-level values; a list of prompts takes the names that the recipe gives them. Includes come first, then overrides
    and values, then variables; mask files are read and videos looked for last.

    Raises:
        RecipeError: not YAML, an unknown key, a wrong type or value, a path out of its folder.
    """
    path = find(recipe)
    tree = applied(tree_of(path), overrides)
    given = {key: _beside(tree.get(key), Tree.of(value, tree.origin)) for key, value in (values or {}).items()}
    return _recipe(located(kept(filled(Tree({**tree.value, **given}, tree.origin, tree.line)))))


def _beside(old: Tree | None, new: Tree) -> Tree:
    """A list in place of what has names takes these, in order."""
    if old is None or not isinstance(old.value, dict) or not isinstance(new.value, list):
        return new
    if len(new.value) != len(old.keys):
        names = ", ".join(old.keys)
        raise old.error(
            f"prompts must be as many as the recipe names, {names}. Got {len(new.value)}. Repeat -p for each."
        )
    return Tree(dict(zip(old.keys, new.value, strict=True)), new.origin)


def validate(data: Mapping[str, Any], origin: str) -> Recipe:
    """A recipe from plain data.

    Raises:
        RecipeError: one sentence for the first thing that is wrong.
    """
    return _recipe(located(kept(filled(Tree.of(data, Origin(origin))))))


def dump(recipe: Recipe) -> str:
    """YAML text that loads to the same recipe."""
    data = escaped(recipe.model_dump(mode="json"))
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=110)


def _recipe(tree: Tree) -> Recipe:
    try:
        return Recipe.model_validate(tree.plain)
    except ValidationError as error:
        raise error_of(error, tree) from error
