"""The table of the README: what each shipped recipe is, where it runs, and what its study found. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recipes import study, study_store
from recipes.language import parse

FAMILIES = study_store.RESULTS.parent / "families.json"
"""What every recipe did on each family that runs through its stock pipeline: `RUNS`, or why not."""

RUNS = "runs"

_NAMES = {"hunyuan": "HunyuanVideo", "mochi": "Mochi", "sd3": "SD3", "flux": "FLUX", "wan": "Wan"}

_HEAD = ("recipe", "source", "families", "measured", "with it", "without", "in a wrong place")


def markdown(results: Path) -> str:
    """One line per shipped recipe, from the stored results in a folder."""
    found, ends = study_store.stored(results), json.loads(FAMILIES.read_text(encoding="utf-8"))
    lines = [_line(_HEAD), _line(["---"] * len(_HEAD))]
    for name in parse.names():
        recipe = parse.load(name)
        numbers = _numbers(recipe.status, found.get(name))
        lines += [_line([f"`{name}`", recipe.source, _families(ends[name]), *numbers])]
    return "\n".join(lines)


def _families(ends: Mapping[str, str]) -> str:
    """Where a recipe runs; CogVideoX has a loop of our own."""
    without = [name for family, name in _NAMES.items() if ends[family] != RUNS]
    if len(without) == len(_NAMES):
        return "CogVideoX"
    return f"all but {', '.join(without)}" if without else "all"


def _numbers(status: str | None, told: Mapping[str, Any] | None) -> list[str]:
    """The first measure of a study and its arms; the status of the recipe where there is none."""
    if told is None:
        return [status or "", "", "", ""]
    measure = told["measures"][0]
    unit = f" ({measure['unit']})" if measure["unit"] else ""
    name = f"{measure['name'].replace('_', ' ')}{unit}, {measure['want']}"
    if not measure["difference to"]:
        return [name, _extremes(measure["arms"]), "", ""]
    verdict = "" if study.shown(told) else "; not shown"
    cells = [_cell(measure["arms"].get(arm)) for arm in ("recipe", "empty", "wrong")]
    return [name + verdict, *cells]


def _extremes(arms: Mapping[str, Mapping[str, float]]) -> str:
    """The arms of a scan with the lowest and the highest mean."""
    low, high = min(arms, key=lambda arm: arms[arm]["mean"]), max(arms, key=lambda arm: arms[arm]["mean"])
    return f"{_mean(arms[low])} ({low}) to {_mean(arms[high])} ({high})"


def _mean(arm: Mapping[str, float]) -> str:
    return f"{arm['mean']:.{_digits(arm)}f}"


def _digits(arm: Mapping[str, float]) -> int:
    return 1 if abs(arm["mean"]) >= 10 else 2


def _cell(arm: Mapping[str, float] | None) -> str:
    if arm is None:
        return ""
    digits = _digits(arm)
    return f"{_mean(arm)} [{arm['low']:.{digits}f}, {arm['high']:.{digits}f}]"


def _line(cells: list[str] | tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"
