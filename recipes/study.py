"""Studies: whether a recipe does what it says, over many seeds, beside the empty recipe and the same edit in a wrong
place. Results are stored as JSON; the table in the README is made of them. No torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator
from scipy.stats import bootstrap

from probe.errors import UsageError
from recipes import effect
from recipes.language import plan_file
from recipes.language.part import Part
from recipes.study_store import Done

STUDIES = Path(__file__).parent / "studies"
"""The studies that come with the recipes."""

CONFIDENCE = 0.95


class Measure(Part):
    """A number of `recipes.effect`, its arguments, and which way the recipe should move it. What saves work cannot be
    nearer to the whole attention than no edit is: such a measure names the arms it is `against`, and the rest are shown
    beside it.
    """

    name: str = Field(description="a function of recipes.effect")
    want: Literal["higher", "lower"] = Field(description="which way the recipe moves it, against other arms")
    against: list[str] | None = Field(default=None, description="the arms it must beat; null: all others; []: none")
    unit: str = ""
    arguments: dict[str, Any] = Field(default_factory=dict)


class Study(Part):
    """What to run and what to look at. `arms` are overrides of the recipe (as `--set` takes them) beside the recipe
    itself; `empty` and `wrong` must be among them where a claim is made. `scan` runs the recipe once per layer or head
    instead, with that number as a variable of the recipe.
    """

    recipe: str
    claim: str = Field(description="what the recipe is said to do, in one sentence")
    substitute: str = Field(default="", description="which published score a measure stands in for")
    measures: list[Measure] = Field(min_length=1)
    arms: dict[str, dict[str, Any]] = Field(default_factory=dict)
    scan: dict[str, Literal["layers", "heads"]] = Field(default_factory=dict)
    set: dict[str, Any] = Field(default_factory=dict, description="overrides for every arm, such as sampler.steps")

    @model_validator(mode="after")
    def _has_controls(self) -> Study:
        if not self.scan and not {"empty", "wrong"} <= set(self.arms):
            raise ValueError(f"must have the arms empty and wrong. Got {', '.join(self.arms) or 'none'}")
        for arm in (arm for measure in self.measures for arm in measure.against or ()):
            if arm not in self.arms:
                raise ValueError(f"must be against its own arms. Got {arm}; they are {', '.join(self.arms) or 'none'}")
        return self

    def refuse_unknown(self) -> None:
        """Nothing, if its measures are there and get their own arguments.

        Raises:
            UsageError: one is not.
        """
        for measure in self.measures:
            effect.refuse_unknown(measure.name, measure.arguments)


def names() -> tuple[str, ...]:
    """The studies by name."""
    return plan_file.names(STUDIES)


def load(name: str) -> Study:
    """A study by its name or file.

    Raises:
        UsageError: no such study.
        RecipeError: its file is not a study.
    """
    return plan_file.load(Study, name, STUDIES)


def arms_of(study: Study, counts: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """The overrides of every arm: the recipe and its controls, or one arm per value of a scan; `counts` are the layers
    and heads of the model.
    """
    if not study.scan:
        return {"recipe": {}, **study.arms}
    spans = [[(variable, value) for value in range(counts[over])] for variable, over in study.scan.items()]
    scanned = {
        " ".join(f"{variable} {value}" for variable, value in pick): {f"variables.{k}": v for k, v in pick}
        for pick in product(*spans)
    }
    return {**study.arms, **scanned}


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % bootstrap interval over seeds."""

    mean: float
    low: float
    high: float

    def excludes_zero(self, want: str) -> bool:
        """Whether the whole interval lies on the wanted side of 0."""
        return self.low > 0 if want == "higher" else self.high < 0

    def facts(self) -> dict[str, float]:
        """As JSON keeps it."""
        return {"mean": self.mean, "low": self.low, "high": self.high}


def interval(values: Sequence[float]) -> Interval:
    """Mean and percentile bootstrap interval (10,000 resamples, seed 0); a constant gives an interval of no width.

    Raises:
        UsageError: fewer than two values, or one that is not finite.
    """
    given = np.asarray(values, float)
    if len(given) < 2 or not np.isfinite(given).all():
        raise UsageError(
            f"An interval must have two finite values or more. Got {values}. Run more seeds, or another measure."
        )
    if np.ptp(given) == 0:
        return Interval(float(given[0]), float(given[0]), float(given[0]))
    made = bootstrap((given,), np.mean, confidence_level=CONFIDENCE, method="percentile", n_resamples=9999, rng=0)
    return Interval(float(given.mean()), float(made.confidence_interval.low), float(made.confidence_interval.high))


Make = Callable[[Mapping[str, Any], int], effect.Made]
"""(overrides of the recipe, seed) -> what it made."""


def carry_out(
    study: Study, seeds: Sequence[int], make: Make, arms: Mapping[str, Mapping[str, Any]], done: Done | None = None
) -> dict[str, Any]:
    """Measure every arm at every seed; `arms` holds the recipe itself as "recipe" and all others. Seeds that are `done`
    are not measured again.

    Returns what is stored: values [seeds] by arm and measure, their intervals, and for each other arm the interval of
    the paired difference recipe - arm.
    """
    done = done or Done()
    for seed in seeds:
        if str(seed) not in done.values:
            done.add(seed, {arm: _measured(study, make({**study.set, **arms[arm]}, seed)) for arm in arms})
    of_seed = [done.values[str(seed)] for seed in seeds]
    values = {arm: [list(one) for one in zip(*(found[arm] for found in of_seed), strict=True)] for arm in arms}
    return {
        "recipe": study.recipe,
        "claim": study.claim,
        "substitute": study.substitute,
        "seeds": list(seeds),
        "confidence": CONFIDENCE,
        "measures": [
            _told(measure, {arm: of[number] for arm, of in values.items()})
            for number, measure in enumerate(study.measures)
        ],
    }


def _measured(study: Study, made: effect.Made) -> list[float]:
    return [effect.measured(made, measure.name, measure.arguments) for measure in study.measures]


def _told(measure: Measure, values: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    arms = {arm: {**interval(of).facts(), "values": of} for arm, of in values.items()}
    against = {}
    for arm in values if measure.against is None else measure.against:
        if "recipe" in values and arm != "recipe":
            pairs = zip(values["recipe"], values[arm], strict=True)
            difference = interval([a - b for a, b in pairs])
            against[arm] = {**difference.facts(), "excludes zero": difference.excludes_zero(measure.want)}
    return {**measure.model_dump(), "arms": arms, "difference to": against}


def shown(result: Mapping[str, Any]) -> bool:
    """Whether every measure beats every other arm beyond chance."""
    return all(arm["excludes zero"] for measure in result["measures"] for arm in measure["difference to"].values())


def rows(results: Mapping[str, Mapping[str, Any]]) -> list[dict[str, str]]:
    """One line per study and measure, for tables; of a scan one line per layer or head."""
    return [row for name, result in results.items() for row in _rows(name, result)]


def _rows(name: str, result: Mapping[str, Any]) -> list[dict[str, str]]:
    seeds, measures = str(len(result["seeds"])), result["measures"]
    if "recipe" in measures[0]["arms"]:
        return [{"study": name, "measure": _named(m), **_cells(m), "seeds": seeds} for m in measures]
    return [
        {"study": name, "at": arm, **{_named(m): _cell(m["arms"][arm]) for m in measures}, "seeds": seeds}
        for arm in measures[0]["arms"]
    ]


def _named(measure: Mapping[str, Any]) -> str:
    """With what tells it apart from others of its kind."""
    given = [str(measure["arguments"][key]) for key in ("color", "mask", "name") if key in measure["arguments"]]
    return " ".join([measure["name"], *given, *([f"({measure['unit']})"] if measure["unit"] else [])])


def _cells(measure: Mapping[str, Any]) -> dict[str, str]:
    return {name: _cell(arm) for name, arm in measure["arms"].items()}


def _cell(arm: Mapping[str, float]) -> str:
    return f"{arm['mean']:.2f} [{arm['low']:.2f}, {arm['high']:.2f}]"


def verdict(result: Mapping[str, Any]) -> str:
    """What a stored result says, in one word."""
    claimed = any(measure["difference to"] for measure in result["measures"])
    return ("shown" if shown(result) else "not shown") if claimed else "measured"
