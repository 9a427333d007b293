"""One sentence for what is wrong with a recipe: where it stands, what must hold, what came. No torch."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from probe.errors import RecipeError
from recipes.language import registry
from recipes.language.include import short
from recipes.language.parse_tree import Tree
from recipes.language.recipe import Recipe

SCHEMA = "See `mmdit recipes schema`."
Path = tuple[str | int, ...]


def error_of(error: ValidationError, tree: Tree, root: type[BaseModel] = Recipe) -> RecipeError:
    """The first error of the validation of a `root`, at its place in the tree; a key that is misspelt before one that
    is missing.
    """
    first: Mapping[str, Any] = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
    kind, context = first["type"], first.get("ctx", {})
    if kind == "meaning":
        return tree.at(*context["path"]).error(first["msg"])
    path = _path(first["loc"], tree, missing=kind == "missing")
    at, place = tree.at(*path), short(".".join(map(str, path))) or f"the {root.__name__.lower()}"
    hint = SCHEMA if root is Recipe else "Correct it."
    if kind == "extra_forbidden":
        known = _keys(first["loc"][:-1], tree, root)
        return at.error(f"every key must be known. Got {place}. {_nearest(path[-1], known, 'Known keys here')}")
    if kind == "missing":
        return at.error(f"{place} must be given. Got nothing. Add it.")
    if kind in ("op", "union_tag_invalid"):
        op, known = at.at("op"), context.get("known") or _quoted(context["expected_tags"])
        return op.error(
            f"{place}.op must name a known operator. Got {op.value!r}. {_nearest(op.value, known, 'Known')}"
        )
    if kind == "union_tag_not_found":
        return at.error(f"{place} must be a mapping that names its op. Got {_short(first['input'])}. {hint}")
    if kind == "package":
        return at.error(f"{place}: {first['msg']}")
    return at.error(f"{place} {_rule(first['msg'])}. Got {_short(first['input'])}. {_hint(first) or hint}")


def _path(location: Sequence[str | int], tree: Tree, missing: bool) -> Path:
    """The keys of a location that are keys of the recipe; pydantic adds the names of the forms that a value has."""
    path: list[str | int] = []
    for i, part in enumerate(location):
        value = tree.at(*path).value
        there = part in value if isinstance(value, dict) else isinstance(value, list) and isinstance(part, int)
        if there or (missing and i == len(location) - 1):
            path.append(part)
    return tuple(path)


def _rule(message: str) -> str:
    said = message.removeprefix("Value error, ")
    for known, ours in (("Input should", "must"), ("String should have", "must have")):
        said = said.replace(known, ours)
    return said if said.startswith("must") else f"must be right: {said}"


def _hint(error: Mapping[str, Any]) -> str:
    """The nearest key or word; nothing where there is none."""
    given = error["input"]
    if error["type"] == "form" and isinstance(given, Mapping):
        words, known = list(given), error["ctx"]["known"] if "ctx" in error else ["op"]
    elif error["type"] == "literal_error" and isinstance(given, str):
        words, known = [given], _quoted(error["ctx"]["expected"])
    else:
        return ""
    near = [match for word in words for match in difflib.get_close_matches(str(word), known, 1)]
    return f"Did you mean {near[0]}?" if near else ""


def _nearest(name: object, known: Collection[str], there: str) -> str:
    near = difflib.get_close_matches(str(name), known, 1)
    return f"Did you mean {near[0]}?" if near else f"{there}: {', '.join(known)}."


def _quoted(text: str) -> list[str]:
    return re.findall(r"'([^']*)'", text)


def _short(value: Any) -> str:
    said = repr(value)
    return said if len(said) <= 80 else f"{said[:77]}..."


def _keys(location: Sequence[str | int], tree: Tree, root: type[BaseModel]) -> list[str]:
    """The known keys of the mapping at a location, which names keys and, where there are several, forms."""
    models: list[type[BaseModel]] = [root]
    for i, part in enumerate(location):
        if part == "package":
            models = [registry.operator(tree.at(*_path(location[:i], tree, missing=False), "op").value).model]
        elif isinstance(part, str):
            forms = [model for model in models if part in (model.__name__, _op(model))]
            models = forms or [inner for model in models for inner in _models_at(model, part)] or models
    return [field.alias or name for name, field in models[0].model_fields.items()]


def _op(model: type[BaseModel]) -> object:
    return model.model_fields["op"].default if "op" in model.model_fields else None


def _models_at(model: type[BaseModel], key: str) -> list[type[BaseModel]]:
    fields = model.model_fields.items()
    return [one for name, field in fields if key in (name, field.alias) for one in _models(field.annotation)]


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in getattr(annotation, "__args__", ()) for model in _models(inner)]
