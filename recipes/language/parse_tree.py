"""YAML text to a tree of values that know the line they came from. Nothing in a text is ever executed, and what it can
grow to is bounded. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from probe.errors import RecipeError

MOST_BYTES = 1_000_000
"""Of a file."""
MOST_VALUES = 100_000
"""Written in a file."""
MOST_GROWN = 4_000_000
"""Of a tree, its characters and values, once aliases and variables are written out."""
MOST_DEPTH = 32
"""Lists and mappings inside of each other."""

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class Origin:
    """Where a value was written: a name for errors, and the folder that its paths start from."""

    name: str
    folder: Path | None = None


@dataclass(frozen=True)
class Tree:
    """A value, its origin and its line, counted from 1. `value` is a mapping or a list of trees, or a plain value.

    Raises:
        RecipeError: it is too large or too deep.
    """

    value: Any
    origin: Origin
    line: int | None = None
    size: int = field(init=False, compare=False)
    depth: int = field(init=False, compare=False)

    def __post_init__(self) -> None:
        size, depth = 1 + len(self.value) if isinstance(self.value, str) else 1, 0
        for part in self.inner:
            size, depth = size + part.size, max(depth, part.depth)
        object.__setattr__(self, "size", size + sum(map(len, self.keys)))
        object.__setattr__(self, "depth", depth + 1)
        if self.size > MOST_GROWN:
            raise self.error(
                f"a recipe must stay under {MOST_GROWN:,} characters once aliases and variables are written out. Got "
                f"{self.size:,} or more. Leave out what repeats."
            )
        if self.depth > MOST_DEPTH:
            raise self.error(
                f"lists and mappings must be at most {MOST_DEPTH} deep. Got {self.depth} or more. Make it flatter."
            )

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of a mapping."""
        return tuple(self.value) if isinstance(self.value, dict) else ()

    @property
    def inner(self) -> list[Tree]:
        """The values of a mapping or a list."""
        if isinstance(self.value, dict):
            return list(self.value.values())
        return self.value if isinstance(self.value, list) else []

    @property
    def plain(self) -> Any:
        """Without lines."""
        if isinstance(self.value, dict):
            return {key: part.plain for key, part in self.value.items()}
        return [part.plain for part in self.value] if isinstance(self.value, list) else self.value

    def get(self, key: str) -> Tree | None:
        """A value of a mapping."""
        return self.value.get(key) if isinstance(self.value, dict) else None

    def at(self, *path: str | int) -> Tree:
        """The value at a path, or the last one on the way."""
        if not path:
            return self
        key, *rest = path
        if isinstance(self.value, dict) and key in self.value:
            return self.value[key].at(*rest)
        if isinstance(self.value, list) and isinstance(key, int) and key < len(self.value):
            return self.value[key].at(*rest)
        return self

    def placed(self, at: Tree) -> Tree:
        """The same value as if it were written elsewhere."""
        other = copy(self)
        object.__setattr__(other, "origin", at.origin)
        object.__setattr__(other, "line", at.line)
        return other

    def error(self, sentence: str) -> RecipeError:
        """An error that says where this value stands."""
        return RecipeError(f"{self.origin.name}{f', line {self.line}' if self.line else ''}: {sentence}")

    @classmethod
    def of(cls, value: Any, origin: Origin) -> Tree:
        """Plain data as a tree without lines."""
        if isinstance(value, Mapping):
            return cls({str(key): cls.of(part, origin) for key, part in value.items()}, origin)
        return cls([cls.of(part, origin) for part in value] if isinstance(value, list | tuple) else value, origin)


def read(text: str, origin: Origin) -> Tree:
    """The tree of a YAML text with one document.

    Raises:
        RecipeError: not YAML, or more than plain data: tags, keys given twice, an alias within itself; or too large.
    """
    try:
        return _Reader(text, origin).document()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        cause = " ".join(str(getattr(error, "problem", None) or error).split())
        here = Tree(None, origin, min(mark.line + 1, len(text.splitlines()) or 1) if mark else None)
        hint = 'Write "${name}" in quotes inside of [] and {}' if "${" in text else "Mend that line"
        raise here.error(f"a recipe must be readable YAML. Got: {cause}. {hint}.") from error


class _Reader:
    """Builds trees from the events of one text."""

    def __init__(self, text: str, origin: Origin) -> None:
        self.events = yaml.parse(text, Loader=_LOADER)
        self.origin = origin
        self.anchors: dict[str, Tree | None] = {}
        self.count = 0
        self.scalars = scalars = yaml.SafeLoader("")
        kinds = {"bool": scalars.construct_yaml_bool, "int": scalars.construct_yaml_int}
        kinds |= {"float": scalars.construct_yaml_float, "null": lambda _: None}
        self.kinds = {f"tag:yaml.org,2002:{kind}": make for kind, make in kinds.items()}

    def document(self) -> Tree:
        next(self.events)
        if isinstance(next(self.events), yaml.StreamEndEvent):
            return Tree(None, self.origin, 1)
        tree = self._value(next(self.events), 0)
        next(self.events)
        more = next(self.events)
        if isinstance(more, yaml.DocumentStartEvent):
            raise self._error(more, "a recipe must be one YAML document. Got a second one. Make it a file.")
        return tree

    def _value(self, event: Any, depth: int) -> Tree:
        self.count += 1
        if self.count > MOST_VALUES:
            raise self._error(event, f"a recipe must have at most {MOST_VALUES:,} values. Got more. Leave some out.")
        if isinstance(event, yaml.AliasEvent):
            return self._aliased(event)
        if event.tag is not None:
            raise self._error(event, f"a recipe must be plain YAML without tags. Got {event.tag}. Leave the tag out.")
        if event.anchor is not None:
            self.anchors[event.anchor] = None
        if isinstance(event, yaml.ScalarEvent):
            value = self._scalar(event)
        elif depth == MOST_DEPTH:
            raise self._error(
                event, f"lists and mappings must be at most {MOST_DEPTH} deep. Got more. Make it flatter."
            )
        else:
            value = (self._list if isinstance(event, yaml.SequenceStartEvent) else self._mapping)(depth)
        tree = Tree(value, self.origin, event.start_mark.line + 1)
        if event.anchor is not None:
            self.anchors[event.anchor] = tree
        return tree

    def _aliased(self, event: Any) -> Tree:
        name = event.anchor
        if name not in self.anchors:
            raise self._error(event, f"an alias must come after its anchor. Got *{name}. Write &{name} above.")
        tree = self.anchors[name]
        if tree is None:
            raise self._error(event, f"an alias must not stand within its own anchor. Got *{name}. Write it out.")
        return tree

    def _list(self, depth: int) -> list[Tree]:
        parts = []
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            parts.append(self._value(event, depth + 1))
        return parts

    def _mapping(self, depth: int) -> dict[str, Tree]:
        own: dict[str, Tree] = {}
        merged: dict[str, Tree] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            if not isinstance(event, yaml.ScalarEvent) or event.tag is not None:
                raise self._error(event, "every key must be a plain text. Got something else. Write key: value.")
            key, value = event.value, self._value(next(self.events), depth + 1)
            if key == "<<" and event.implicit[0]:
                merged = self._merged(value) | merged
            elif key in own:
                raise self._error(event, f"every key must be given once. Got {key} again. Keep one of them.")
            else:
                own[key] = value
        return merged | own

    def _merged(self, value: Tree) -> dict[str, Tree]:
        sources = value.value if isinstance(value.value, list) else [value]
        if not all(isinstance(source.value, dict) for source in sources):
            raise value.error("<< must be given mappings. Got something else. Write <<: *name of a mapping.")
        return {key: part for source in reversed(sources) for key, part in source.value.items()}

    def _scalar(self, event: Any) -> Any:
        """null, bool, int, float or text; what YAML takes for dates and the like stays text."""
        tag = self.scalars.resolve(yaml.ScalarNode, event.value, event.implicit) if event.implicit[0] else ""
        if tag not in self.kinds:
            return event.value
        try:
            value = self.kinds[tag](yaml.ScalarNode(tag, event.value))
        except ValueError as error:
            got = f"{event.value[:40]!r}"
            raise self._error(event, f"a number must be readable. Got {got}. Quote it if it is a text.") from error
        if isinstance(value, float) and math.isnan(value):
            raise self._error(event, "a number must be one. Got nan. Leave the key out for its default.")
        return value

    def _error(self, event: Any, sentence: str) -> RecipeError:
        return Tree(None, self.origin, event.start_mark.line + 1).error(sentence)
