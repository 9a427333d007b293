"""Searches: the layers or heads at which a recipe works best, found greedily over clips (HeadHunter). No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from control.search import greedy
from recipes import effect
from recipes.language import plan_file
from recipes.language.part import Count, Name, Part
from recipes.study import Make, Measure

SEARCHES = Path(__file__).parent / "searches"
"""The searches that come with the recipes."""

Place = tuple[int, ...]
"""(layer,) or (layer, head)."""


class Search(Part):
    """What to search, and by which measure. The recipe takes what is tried from `variable`: [[layer, head], ...] for
    `places` over heads, {only: [layer, ...]} for `layers` over layers.
    """

    recipe: str
    over: Literal["layers", "heads"] = "heads"
    variable: Name = Field(default="places", description="the variable of the recipe that is searched")
    rounds: Count = 1
    keep: Count = Field(default=4, description="how many are added in each round")
    measure: Measure
    substitute: str = Field(default="", description="which published score the measure stands in for")
    empty: dict[str, Any] = Field(default_factory=dict, description="overrides that undo the recipe, to compare with")
    set: dict[str, Any] = Field(default_factory=dict, description="overrides for every clip, such as sampler.steps")


def names() -> tuple[str, ...]:
    """The searches by name."""
    return plan_file.names(SEARCHES)


def load(name: str) -> Search:
    """A search by its name or file.

    Raises:
        UsageError: no such search.
        RecipeError: its file is not a search.
    """
    return plan_file.load(Search, name, SEARCHES)


def search(hunt: Search, seeds: Sequence[int], make: Make, counts: Mapping[str, int]) -> dict[str, Any]:
    """Score each layer or head with what was chosen so far and keep the best, as often as the search says; `counts` are
    the layers and heads of the model. A score is the mean of the measure over seeds.

    Returns the places chosen, the worst of the first round to compare with, the scores of every round, and the score of
    the empty recipe.

    Raises:
        UsageError: more to choose than there are.
    """

    def score(overrides: Mapping[str, Any]) -> float:
        given = {**hunt.set, **overrides}
        measure = hunt.measure
        return float(np.mean([effect.measured(make(given, s), measure.name, measure.arguments) for s in seeds]))

    sign = 1 if hunt.measure.want == "higher" else -1
    ranges = [range(counts["layers"]), *([range(counts["heads"])] if hunt.over == "heads" else [])]
    found = greedy(product(*ranges), lambda tried: sign * score(_taken(hunt, tried)), hunt.rounds, hunt.keep)
    first = sorted(found.rounds[0], key=lambda place: found.rounds[0][place])
    return {
        "recipe": hunt.recipe,
        "measure": hunt.measure.model_dump(),
        "substitute": hunt.substitute,
        "seeds": list(seeds),
        "chosen": [list(place) for place in found.chosen],
        "worst": [list(place) for place in first[: len(found.chosen)]],
        "rounds": [[[*place, sign * value] for place, value in scores.items()] for scores in found.rounds],
        "empty": score(hunt.empty),
    }


def rows(result: Mapping[str, Any]) -> list[dict[str, str]]:
    """What was chosen and what was worst, one line each, with the score of the round in which it was tried; for
    tables.
    """
    scores = [{tuple(place): value for *place, value in scored} for scored in result["rounds"]]
    kept = len(result["chosen"]) // len(scores)
    told = [("chosen", place, scores[number // kept]) for number, place in enumerate(result["chosen"])]
    told += [("worst", place, scores[0]) for place in result["worst"]]
    return [
        {
            "": which,
            "layer": str(place[0]),
            **({"head": str(place[1])} if len(place) > 1 else {}),
            result["measure"]["name"]: f"{scored[tuple(place)]:.3f}",
        }
        for which, place, scored in told
    ]


def _taken(hunt: Search, tried: Sequence[Place]) -> dict[str, Any]:
    value = [list(place) for place in tried] if hunt.over == "heads" else {"only": [place[0] for place in tried]}
    return {f"variables.{hunt.variable}": value}
