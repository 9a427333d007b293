"""Studies and searches as YAML files: by the name of a shipped one, or by path. No torch."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from probe.errors import UsageError
from recipes.language.include import file_at, short, text_of
from recipes.language.parse_error import error_of
from recipes.language.parse_tree import Origin, read
from recipes.language.part import Part

P = TypeVar("P", bound=Part)


def names(folder: Path) -> tuple[str, ...]:
    """The plans of a folder by name."""
    return tuple(sorted(file.stem for file in folder.glob("*.yaml")))


def load(kind: type[P], name: str, folder: Path) -> P:
    """A plan by its name in `folder`, or a file.

    Raises:
        UsageError: no such plan; names the nearest.
        RecipeError: its file is not one.
    """
    known = names(folder)
    path = folder / f"{name}.yaml" if name in known else file_at(name)
    if path is None:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"Did you mean {near[0]}?" if near else f"There are {', '.join(known) or 'none'}."
        raise UsageError(f"A {kind.__name__.lower()} must be a name or a YAML file. Got {short(name)}. {hint}")
    tree = read(text_of(path), Origin(path.name, path.parent))
    try:
        return kind.model_validate(tree.plain)
    except ValidationError as error:
        raise error_of(error, tree, kind) from error
