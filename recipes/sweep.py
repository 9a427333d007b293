"""Sweeps: every recipe of a plan on every group of a prompt suite with every seed, each a run folder. No torch.

    schema_version: 1
    suite: {name: miniature, kinds: [color, shape], limit: 4}
    seeds: [0, 1]
    arms:
      shared: {recipe: ditctrl}
      plain: {recipe: ditctrl, set: {edits: []}}
    set: {sampler.steps: 10}

Names and paths of suites and recipes are as on the command line.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from probe.errors import RecipeError, StoreError, UsageError
from probe.store import Run
from recipes.language import parse, plan_file
from recipes.language.folder import text_of
from recipes.language.part import Name, Part, Text
from recipes.language.recipe import Recipe
from recipes.suite import Group, Selection

SWEEPS = Path(__file__).parent / "sweeps"
"""The sweeps that come with the recipes."""


class Arm(Part):
    """One recipe of a sweep."""

    recipe: Text = Field(description="a built-in name, or a file")
    set: dict[str, Any] = Field(default_factory=dict, description="overrides, as --set takes them")
    objects: list[Text] = Field(
        default_factory=list, description="keys that take the objects of a group, such as record.words, edits.0.objects"
    )


class Sweep(Part):
    """What to run, on what, and what to compare with."""

    schema_version: Literal[1] = Field(description="of this format")
    suite: Selection
    arms: dict[Name, Arm] = Field(min_length=1, description="recipes by a name of this sweep")
    seeds: list[Annotated[int, Field(ge=0, lt=2**63)]] = Field(default=[0], min_length=1)
    model: Text | None = Field(default=None, description="in place of the recipes' own")
    features: Text | None = Field(default="miniature", description="what measures the videos; null: nothing does")
    reference: Name | None = Field(default=None, description="the arm that others are compared with; null: the first")
    set: dict[str, Any] = Field(default_factory=dict, description="overrides for every arm, such as sampler.steps")

    @model_validator(mode="after")
    def _means_something(self) -> Sweep:
        for key, said in self._faults():
            raise PydanticCustomError("meaning", "{said}", {"path": (key,), "said": said})
        return self

    def _faults(self) -> Iterator[tuple[str, str]]:
        """(key, sentence) of what is wrong."""
        arms = ", ".join(self.arms)
        if self.reference is not None and self.reference not in self.arms:
            yield "reference", f"reference must be one of the arms, {arms}. Got {self.reference}. Correct it."
        if len(set(self.seeds)) < len(self.seeds):
            yield "seeds", f"seeds must differ from each other. Got {self.seeds}. Leave out what comes twice."
        if len({arm.lower() for arm in self.arms}) < len(self.arms):
            yield "arms", f"arms must differ in more than capitals. Got {arms}. Rename one."

    @property
    def compared_with(self) -> str:
        """The arm that the others are compared with."""
        return self.reference or next(iter(self.arms))


@dataclass(frozen=True)
class Task:
    """One run of a sweep."""

    arm: str
    group: str
    kind: str
    seed: int
    recipe: Recipe
    out: Path
    features: str | None = None

    @property
    def key(self) -> tuple[str, str, int]:
        """What tells it apart from the others."""
        return self.arm, self.group, self.seed

    @property
    def folder(self) -> Path:
        """Its run folder, in the folder `out` of the sweep."""
        return self.out / "runs" / self.arm / self.group / str(self.seed)


def names() -> tuple[str, ...]:
    """The sweeps by name."""
    return plan_file.names(SWEEPS)


def load(name: str) -> Sweep:
    """A sweep by its name or file.

    Raises:
        UsageError: no such sweep.
        RecipeError: its file is not a sweep.
    """
    return plan_file.load(Sweep, name, SWEEPS)


def tasks(plan: Sweep, groups: Sequence[Group], out: Path) -> list[Task]:
    """Every run, group by group and seed by seed, so that the arms of a pair are made together.

    Raises:
        RecipeError: a recipe that does not exist, or does not validate with the prompts of a group.
        UsageError: an arm that needs what a group does not say.
    """
    made = {(group.id, name): _recipe(plan, name, group) for group, name in product(groups, plan.arms)}
    return [
        Task(name, group.id, group.kind, seed, _seeded(made[group.id, name], seed), out.resolve(), plan.features)
        for group, seed, name in product(groups, plan.seeds, plan.arms)
    ]


def _seeded(recipe: Recipe, seed: int) -> Recipe:
    return recipe.model_copy(update={"sampler": recipe.sampler.model_copy(update={"seed": seed})})


def _recipe(plan: Sweep, name: str, group: Group) -> Recipe:
    arm = plan.arms[name]
    given = {**plan.set, **arm.set}
    for key in arm.objects:
        if group.objects is None:
            raise UsageError(
                f"Every group must say its objects, which {name} takes as {key}. Got {group.id} without. Add them, or "
                "leave it out by kinds."
            )
        given[key] = group.objects
    if group.durations is not None:
        if parse.load(arm.recipe).segments is None:
            raise UsageError(
                f"A group with durations must meet recipes with segments. Got {name} for {group.id}. Leave one of them "
                "out."
            )
        given["segments.durations"] = group.durations
    values: dict[str, Any] = {"prompts": group.prompts} | ({"model": plan.model} if plan.model else {})
    try:
        return parse.load(arm.recipe, [f"{key}={json.dumps(value)}" for key, value in given.items()], values)
    except RecipeError as error:
        raise RecipeError(f"{name} with {group.id}: {error}") from error


def refuse_changed(tasks: Sequence[Task]) -> None:
    """Nothing, if the runs that are there already were made by the recipes of now.

    Raises:
        UsageError: one was not; nothing is touched.
    """
    for task in tasks:
        with contextlib.suppress(StoreError):
            if _changed(Run(task.folder), task.recipe):
                raise UsageError(
                    f"A sweep must go on with the recipes and prompts it began with. Got another {task.arm} for "
                    f"{task.group} than that of {task.folder}. Choose another --out, or remove that folder."
                )


def _changed(run: Run, recipe: Recipe) -> bool:
    """By text, and by meaning where the language has grown since."""
    if run.recipe == text_of(recipe):
        return False
    try:
        return parse.load(str(run.path)) != recipe
    except RecipeError:
        return True
