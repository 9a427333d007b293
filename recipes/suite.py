"""Prompt suites: groups of prompts for longer videos, each of one kind of transition, in YAML files. No torch.

    schema_version: 1
    name: mine
    description: one line
    groups:
      - id: colour-1
        kind: colour
        prompts: [a red circle moving right, a blue circle moving right]
        objects: circle
        truth:
          - {things: [[red, circle, right]]}
          - {things: [[blue, circle, right]]}

`objects` names what is one object from prompt to prompt: a text for all, or one text for each. `durations` are seconds,
one per prompt. `truth` says what the world of `recipes.scene` shows. The files of MTVBench are read as they are, see
`recipes.mtvbench`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from probe.errors import UsageError
from probe.word import places_of
from recipes import mtvbench, scene
from recipes.language import plan_file
from recipes.language.include import file_at
from recipes.language.part import Count, Name, Part, Text

SUITES = Path(__file__).parents[1] / "data" / "prompts"
"""The suites of a clone."""


class Truth(Part):
    """What a clip of the miniature's world shows: (color, shape, direction) of each thing, in the prompt's order."""

    things: list[tuple[str, str, str]] = Field(min_length=1)
    background: str = "black"


class Group(Part):
    """Prompts that follow each other in one video."""

    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=64)] = Field(
        description="also the name of a folder"
    )
    kind: Text = Field(description="what changes: background, subject, camera, ...")
    prompts: list[Text] = Field(min_length=2)
    objects: list[Text] | None = Field(default=None, description="what is one object in each prompt, for masks")
    durations: list[Annotated[float, Field(gt=0, allow_inf_nan=False)]] | None = Field(
        default=None, description="seconds that each prompt is shown"
    )
    truth: list[Truth] | None = Field(default=None, description="what the miniature's clip of each prompt shows")

    @model_validator(mode="before")
    @classmethod
    def _one_for_all(cls, given: Any) -> Any:
        """One object's name stands for all prompts."""
        if isinstance(given, dict) and isinstance(given.get("objects"), str) and isinstance(given.get("prompts"), list):
            return {**given, "objects": [given["objects"]] * len(given["prompts"])}
        return given


class Suite(Part):
    """Groups of prompts."""

    schema_version: Literal[1] = Field(description="of this format")
    name: Name
    description: str = ""
    groups: list[Group] = Field(min_length=1)

    @model_validator(mode="after")
    def _means_something(self) -> Suite:
        for path, said in _faults(self.groups):
            raise PydanticCustomError("meaning", "{said}", {"path": ("groups", *path), "said": said})
        return self

    @property
    def kinds(self) -> dict[str, int]:
        """How many groups there are of each kind, in the order of the file."""
        return dict(Counter(group.kind for group in self.groups))


def _faults(groups: Sequence[Group]) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """(place, sentence) of what is wrong. Ids must differ also where a file system takes capitals for small letters."""
    ids: set[str] = set()
    for at, group in enumerate(groups):
        if group.id.lower() in ids:
            yield (at, "id"), f"every group must have an id of its own. Got {group.id} again. Change one."
        ids.add(group.id.lower())
        for name in ("objects", "durations", "truth"):
            given = getattr(group, name)
            if given is not None and len(given) != len(group.prompts):
                yield (
                    (at, name),
                    f"{name} of {group.id} must be as many as its prompts, {len(group.prompts)}. Got {len(given)}. "
                    "Give one for each.",
                )
        for prompt, phrase in zip(group.prompts, group.objects or (), strict=False):
            if not places_of(prompt, phrase):
                yield (
                    (at, "objects"),
                    f"objects of {group.id} must be words of their prompts. Got {phrase!r} for {prompt!r}. Copy the "
                    "words from the prompt.",
                )
        for place, truth in enumerate(group.truth or ()):
            yield from (((at, "truth", place), said) for said in _strange(group.id, truth))


def _strange(group: str, truth: Truth) -> Iterator[str]:
    known = (scene.COLORS, scene.SHAPES, scene.DIRECTIONS)
    words = [(word, there) for thing in truth.things for word, there in zip(thing, known, strict=True)]
    for word, there in (*words, (truth.background, scene.BACKGROUNDS)):
        if word not in there:
            yield f"truth of {group} must be of the miniature's world. Got {word}. Take one of {', '.join(there)}."


class Selection(Part):
    """A suite, or a part of it."""

    name: Text = Field(description="a suite by name, or a file")
    kinds: list[Text] | None = Field(default=None, min_length=1, description="null: all")
    limit: Count | None = Field(default=None, description="groups, taken from each kind in turn; null: all")

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, given: Any) -> Any:
        return {"name": given} if isinstance(given, str) else given


def names() -> tuple[str, ...]:
    """The suites by name."""
    return plan_file.names(SUITES)


def load(name: str) -> Suite:
    """A suite by its name or file: YAML, or a .txt or .json file of MTVBench.

    Raises:
        UsageError: no such suite, or a file of MTVBench that is none.
        RecipeError: its file is not a suite.
    """
    path = None if name in names() else file_at(name)
    if path is not None and path.suffix.lower() in mtvbench.READERS:
        stem, read = _plain(path.stem), mtvbench.read(path)
        groups = [Group(id=f"{stem}-{at}", kind="mtvbench", prompts=prompts) for at, prompts in read]
        return Suite(schema_version=1, name=stem, description="MTVBench", groups=groups)
    return plan_file.load(Suite, name, SUITES)


def chosen(selection: Selection) -> list[Group]:
    """The groups of a selection, in the order of the suite.

    Raises:
        UsageError: no such suite, or it has no such kind.
        RecipeError: its file is not a suite.
    """
    suite = load(selection.name)
    for kind in selection.kinds or ():
        if kind not in suite.kinds:
            raise UsageError(f"A kind must be one of {', '.join(suite.kinds)}. Got {kind}. Correct kinds.")
    groups = [group for group in suite.groups if selection.kinds is None or group.kind in selection.kinds]
    return _in_turn(groups, selection.limit)


def _in_turn(groups: list[Group], limit: int | None) -> list[Group]:
    """The first of each kind, then the second of each, and so on until there are enough; in their own order."""
    places = {kind: count() for kind in (group.kind for group in groups)}
    turns = [next(places[group.kind]) for group in groups]
    taken = sorted(range(len(groups)), key=lambda at: turns[at])[:limit]
    return [groups[at] for at in sorted(taken)]


def _plain(stem: str) -> str:
    """A file's name as an id."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", stem).strip("-_")[:48] or "suite"
