"""Where two runs come from: what of their provenance and recipes is unlike. No torch."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from probe.errors import MmditError
from probe.store import Run
from recipes.language import parse

OWN = ("format", "schema", "started", "finished", "seconds", "recipe", "recipe_text")
"""What run.json says of every run anew; recipes are compared key by key instead of by their hash."""


def unlike(a: Run, b: Run) -> list[dict[str, Any]]:
    """Rows what, A, B: keys of run.json whose values differ, then those of the recipes that do not say it again."""
    rows = _differing(_flat(_kept(a)), _flat(_kept(b)))
    recipes = _differing(_flat(_recipe(a), "recipe"), _flat(_recipe(b), "recipe"))
    return rows + [row for row in recipes if not any(_same(row, told) for told in rows)]


def _same(row: dict[str, Any], told: dict[str, Any]) -> bool:
    """Whether recipe.sampler.seed, for example, says what seed has said."""
    names = {one["what"].rpartition(".")[2] for one in (row, told)}
    return len(names) == 1 and (row["A"], row["B"]) == (told["A"], told["B"])


def _kept(run: Run) -> dict[str, Any]:
    return {name: value for name, value in run.info.items() if name not in OWN}


def _recipe(run: Run) -> dict[str, Any]:
    """The recipe as plain data; empty for a run of probe.record, or a recipe this version cannot read."""
    with contextlib.suppress(MmditError):
        return parse.load(str(run.path / "recipe.yaml")).model_dump(mode="json")
    return {}


def _differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[dict[str, Any]]:
    names = dict.fromkeys((*a, *b))
    return [{"what": name, "A": a.get(name), "B": b.get(name)} for name in names if a.get(name) != b.get(name)]


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested keys joined by dots."""
    if not isinstance(value, Mapping):
        return {name: value}
    inner = [_flat(part, f"{name}.{key}" if name else str(key)) for key, part in value.items()]
    return {key: part for found in inner for key, part in found.items()}
