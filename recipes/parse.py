"""YAML to recipes and back; the only module that reads YAML. Errors name the place and the nearest known key. No
torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from probe.errors import RecipeError
from recipes.recipe import Output, Recipe, Sampler, Segments

LIBRARY = Path(__file__).parent / "library"
_SHORT = {
    name: section
    for section, part in (("sampler", Sampler), ("segments", Segments), ("output", Output))
    for name in part.model_fields
}


def names() -> tuple[str, ...]:
    """The built-in recipes."""
    return tuple(sorted(file.stem for file in LIBRARY.glob("*.yaml")))


def find(recipe: str) -> Path:
    """The file of a built-in name or of a path.

    Raises:
        RecipeError: neither; names the nearest.
    """
    if recipe in names():
        return LIBRARY / f"{recipe}.yaml"
    path = Path(recipe).expanduser()
    if path.is_file():
        return path
    near = difflib.get_close_matches(recipe, names(), 1)
    hint = f"Did you mean {near[0]}?" if near else f"Built in: {', '.join(names())}."
    raise RecipeError(f"A recipe must be a YAML file or a built-in name. Got {recipe}. {hint}")


def load(recipe: str, overrides: Sequence[str] = (), values: Mapping[str, Any] | None = None) -> Recipe:
    """Read and validate a recipe.

    `overrides` are "key=value" texts with dotted keys (`sampler.steps=50`; `steps=50` for short), `values` whole
    top-level values.

    Raises:
        RecipeError: not YAML, an unknown key, a wrong type or value.
    """
    path = find(recipe)
    try:
        data = yaml.safe_load(text_of(path))
    except yaml.YAMLError as error:
        cause = " ".join(str(error).split())
        raise RecipeError(f"A recipe must be readable YAML. Got {path.name}: {cause}. Mend that line.") from error
    if not isinstance(data, dict):
        raise RecipeError(
            f"A recipe must be a mapping of keys. Got {type(data).__name__} in {path.name}. See `mmdit recipes show "
            "record`."
        )
    for text in overrides:
        _override(data, text)
    return validate(data | dict(values or {}), path.name)


def text_of(path: Path) -> str:
    """The text of a recipe file.

    Raises:
        RecipeError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"A recipe must be a readable UTF-8 text. Got {path.name}: {error}. Check the file."
        ) from error


def validate(data: Mapping[str, Any], origin: str) -> Recipe:
    """A recipe from plain data.

    Raises:
        RecipeError: one sentence for the first thing that is wrong.
    """
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError(_sentence(error, origin)) from error


def dump(recipe: Recipe) -> str:
    """YAML text that loads to the same recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)


def _override(data: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise RecipeError(f"--set must be key=value. Got {text!r}. Write for example --set sampler.steps=50.")
    if len(path) == 1 and path[0] in _SHORT:
        path = [_SHORT[path[0]], *path]
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise RecipeError(f"The value of --set must be YAML. Got {text!r}. Quote it.") from error
    place: Any = data
    for i, part in enumerate(path[:-1]):
        place = _step_into(place, part, ".".join(path[: i + 1]))
    last = path[-1]
    if isinstance(place, list):
        place[_index(place, last, key)] = parsed
    else:
        place[last] = parsed


def _step_into(place: Any, part: str, where: str) -> Any:
    if isinstance(place, list):
        return place[_index(place, part, where)]
    if place.get(part) is None:
        place[part] = {}
    if not isinstance(place[part], dict | list):
        raise RecipeError(
            f"--set must name a key inside a section. Got {where}, which is a single value. Check `mmdit recipes show`."
        )
    return place[part]


def _index(place: list[Any], part: str, where: str) -> int:
    if not part.isdigit() or int(part) >= len(place):
        raise RecipeError(
            f"A list entry must be chosen by its number, 0 to {len(place) - 1}. Got {where}. Count from 0."
        )
    return int(part)


def _sentence(error: ValidationError, origin: str) -> str:
    first = error.errors()[0]
    steps = [part for part in first["loc"] if not _is_tag(part)]
    place = ".".join(str(part) for part in steps) or "recipe"
    if first["type"] == "extra_forbidden":
        known = _known_keys(steps[:-1])
        near = difflib.get_close_matches(str(steps[-1]), known, 1)
        hint = f"Did you mean {near[0]}?" if near else f"Known keys here: {', '.join(known)}."
        return f"{origin}: every key must be known. Got {place}. {hint}"
    if first["type"] == "missing":
        return f"{origin}: {place} must be given. Got nothing. Add it."
    said = first["msg"].removeprefix("Value error, ").replace("Input should", "must")
    rule = said if said.startswith("must") else f"must be right: {said}"
    got = f" Got {first['input']!r}." if steps else ""
    return f"{origin}: {place} {rule}.{got} See `mmdit recipes schema`."


def _is_tag(part: Any) -> bool:
    """pydantic adds the names of union members to a location; they are no keys of the recipe."""
    return isinstance(part, str) and (
        part in ("int", "float", "transfer") or "[" in part or part.startswith("constrained-")
    )


def _known_keys(steps: Sequence[Any]) -> list[str]:
    model: Any = Recipe
    for part in steps:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(part)
        model = next((m for m in _models(field.annotation) if m), Recipe) if field else Recipe
    return list(model.model_fields)


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for inner in getattr(annotation, "__args__", ()) for m in _models(inner)]
