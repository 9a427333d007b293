"""The table of the README: what each shipped recipe is, where it runs, and what its study found. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recipes import parse, study
from recipes.recipe import Recipe

FAMILIES = "families"
"""Name of the file beside the results that says which recipe runs on which family; the tests write it."""

_HEAD = ("recipe", "source", "runs on", "measured", "with it", "without", "in a wrong place")


def markdown(results: Path) -> str:
    """One line per shipped recipe, from the stored results in a folder."""
    found = study.stored(results)
    runs = found.pop(FAMILIES, {})
    lines = [_line(_HEAD), _line(["---"] * len(_HEAD))]
    for name in parse.names():
        recipe = parse.load(name)
        told = found.get(name)
        lines += [_line([f"`{name}`", recipe.source, _families(runs.get(name, {})), *_numbers(recipe, told)])]
    return "\n".join(lines)


def families_file(results: Path) -> dict[str, dict[str, bool]]:
    """Which recipe runs on which family, as stored."""
    path = results / f"{FAMILIES}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _families(runs: Mapping[str, bool]) -> str:
    there = [family for family, can in runs.items() if can]
    return "all six" if runs and len(there) == len(runs) else ", ".join(there)


def _numbers(recipe: Recipe, told: Mapping[str, Any] | None) -> list[str]:
    """The first measure of a study and its arms; what the recipe says of itself where there is none."""
    if told is None:
        return [recipe.status or "", "", "", ""]
    measure = told["measures"][0]
    unit = f" ({measure['unit']})" if measure["unit"] else ""
    name = f"{measure['name'].replace('_', ' ')}{unit}, {measure['want']}"
    if not measure["difference to"]:
        return [name, "a scan", "", ""]
    verdict = "" if study.shown(told) else "; not shown"
    cells = [_cell(measure["arms"].get(arm)) for arm in ("recipe", "empty", "wrong")]
    return [name + verdict, *cells]


def _cell(arm: Mapping[str, float] | None) -> str:
    if arm is None:
        return ""
    digits = 1 if abs(arm["mean"]) >= 10 else 2
    return f"{arm['mean']:.{digits}f} [{arm['low']:.{digits}f}, {arm['high']:.{digits}f}]"


def _line(cells: list[str] | tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"
