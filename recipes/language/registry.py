"""What other packages add: operators and recipes, found by their entry points. No torch until one is asked for.

A package declares in its pyproject.toml:

    [project.entry-points."mmdit.operators"]
    blur = "my_package.blur:OPERATOR"       # an Operator
    [project.entry-points."mmdit.recipes"]
    mine = "my_package.recipes"             # a package, or a path: a folder of YAML files
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from probe.errors import RecipeError

OPERATORS = "mmdit.operators"
RECIPES = "mmdit.recipes"


@dataclass(frozen=True)
class Operator:
    """An operator of a recipe: its `op`, the model of its keys (an `Operation` with a Literal op), and
    `build(spec, context)`, which makes handlers of a validated spec; `context` is a `recipes.context.Context`.
    """

    name: str
    model: type[BaseModel]
    build: Callable[[Any, Any], Sequence[Any]]


@dataclass(frozen=True)
class Pack:
    """A folder of recipes and the distribution it comes from; `problem` is a sentence where it cannot be read."""

    name: str
    distribution: str
    folder: Path | None = None
    problem: str = ""

    @property
    def recipes(self) -> tuple[str, ...]:
        """The names of its recipes, ascending."""
        return tuple(sorted(file.stem for file in self.folder.glob("*.yaml"))) if self.folder else ()


def operator_names() -> tuple[str, ...]:
    """The operators that packages add, ascending; none of them is loaded."""
    return tuple(sorted({point.name for point in entry_points(group=OPERATORS)}))


def operator(name: str) -> Operator:
    """The operator of that op.

    Raises:
        RecipeError: no package has it, more than one has it, or it cannot be loaded.
    """
    points = [point for point in entry_points(group=OPERATORS) if point.name == name]
    if not points:
        raise RecipeError(f"An operator must be built in or come with a package. Got {name}.{_near(name)}")
    if len(points) > 1:
        raise RecipeError(
            f"An operator must come from one package. Got {name} from {origin(name)}. Uninstall one of them."
        )
    found = _loaded(points[0])
    if not isinstance(found, Operator):
        raise RecipeError(
            f"The entry point {name} of {_distribution(points[0])} must be a recipes.language.registry.Operator. Got "
            f"{type(found).__name__}. Mend that package, or uninstall it."
        )
    field = found.model.model_fields.get("op")
    if found.name != name or field is None or field.default != name:
        raise RecipeError(
            f"The operator {name} of {_distribution(points[0])} must have this name, and a model with this op. Got "
            f"{found.name} with {field.default if field else 'no op'}. Mend that package, or uninstall it."
        )
    return found


def origin(name: str) -> str:
    """The distributions that an operator comes from."""
    return " and ".join(sorted(_distribution(point) for point in entry_points(group=OPERATORS) if point.name == name))


def packs() -> tuple[Pack, ...]:
    """The folders of recipes that packages add."""
    return tuple(_pack(point) for point in sorted(entry_points(group=RECIPES), key=lambda point: point.name))


def _pack(point: EntryPoint) -> Pack:
    made = Pack(point.name, _distribution(point))
    try:
        given = _loaded(point)
    except RecipeError as error:
        return replace(made, problem=str(error))
    places = getattr(given, "__path__", None)
    folder = Path(next(iter(places))) if places else Path(given) if isinstance(given, str | Path) else None
    if folder is None or not folder.is_dir():
        said = f"The entry point {point.name} of {made.distribution} must be a folder of recipes, or a package."
        return replace(made, problem=f"{said} Got {folder or type(given).__name__}. Mend it, or uninstall it.")
    return replace(made, folder=folder)


def _loaded(point: EntryPoint) -> Any:
    try:
        return point.load()
    except (Exception, SystemExit) as error:
        raise RecipeError(
            f"The entry point {point.name} of {_distribution(point)} must load. Got {type(error).__name__}: {error}. "
            "Mend that package, or uninstall it."
        ) from error


def _distribution(point: EntryPoint) -> str:
    return point.dist.name if point.dist else point.module


def _near(name: str) -> str:
    near = difflib.get_close_matches(name, operator_names(), 1)
    return f" Did you mean {near[0]}?" if near else ""
