"""The table of the README: what each shipped recipe is, what it needs, and what its study found. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recipes import study
from recipes.language import parse
from recipes.language.meaning import needs
from recipes.language.recipe import Recipe

FAMILIES = study.RESULTS / "families.json"
"""What every recipe did on each family that runs through its stock pipeline: `RUNS`, or the sentence that refused it."""

RUNS = "runs"

_HEAD = ("recipe", "source", "needs", "measured", "with it", "without", "in a wrong place")


def markdown(results: Path) -> str:
    """One line per shipped recipe, from the stored results in a folder."""
    found = study.stored(results)
    lines = [_line(_HEAD), _line(["---"] * len(_HEAD))]
    for name in parse.names():
        recipe = parse.load(name)
        told = found.get(name)
        lines += [_line([f"`{name}`", recipe.source, _needs(recipe), *_numbers(recipe, told)])]
    return "\n".join(lines)


def _needs(recipe: Recipe) -> str:
    told = {"loop": "our own loop", "RoPE": "RoPE", "two prompts": ""}
    return ", ".join(filter(None, (told[need] for need in needs(recipe))))


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
