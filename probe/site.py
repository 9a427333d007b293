"""Which attention calls: sites, branches, and `Where`, a selection over both. No torch."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from probe.errors import UsageError

JOINT = frozenset({"joint", "double", "single"})
"""Kinds with text and video in one sequence: double-stream blocks keep projections of their own for each, single-stream
blocks share them."""

SPLIT = frozenset({"self", "cross"})
"""Video alone, and video rows on text columns."""

KINDS = ("joint", "double", "single", "self", "cross")

ROLES = ("plain", "source", "target")
"""Roles of unperturbed branches, which a record keeps; any other is the name of a perturbed pass."""


@dataclass(frozen=True)
class Site:
    """One attention call: 0-based denoising step (from pure noise), turn (nth forward of the step), layer (block of the
    model), nth call of the layer, and the kind of its attention, one of KINDS.
    """

    step: int
    turn: int
    layer: int
    call: int = 0
    kind: str = "joint"

    def __str__(self) -> str:
        extra = (f" turn {self.turn}" if self.turn else "") + (f" call {self.call}" if self.call else "")
        return f"step {self.step}{extra} layer {self.layer}{f' {self.kind}' if self.kind in SPLIT else ''}"


@dataclass(frozen=True)
class Branch:
    """What one batch entry of one call is.

    `prompt` is an index into the prompts of the run. An interpolated condition is `(1 - mix)` of it and `mix` of the
    next one. `guided` is True for the conditional half of classifier-free guidance. `copy` counts the videos of a
    prompt where a call makes several.
    """

    prompt: int = 0
    segment: int = 0
    role: str = "plain"
    guided: bool = True
    mix: float = 0.0
    copy: int = 0

    @property
    def nearest(self) -> int:
        """The prompt with the larger weight: whose words are looked up for this branch."""
        return self.prompt + (self.mix > 0.5)

    def __str__(self) -> str:
        half = "conditional" if self.guided else "unconditional"
        copy = f" copy {self.copy}" if self.copy else ""
        return f"{half} prompt {self.prompt} segment {self.segment} {self.role}{copy}"


def unperturbed(branch: Branch) -> bool:
    """Whether it is conditional, and no perturbed pass."""
    return branch.guided and branch.role in ROLES


@dataclass(frozen=True)
class Progress:
    """The steps (or layers) i of n with start <= i / n < stop: an interval that holds for any number of steps."""

    start: float
    stop: float

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop <= 1:
            raise UsageError(
                f"A progress interval must satisfy 0 <= start < stop <= 1. Got {self.start} to {self.stop}."
            )


Span = int | slice | Collection[int] | Progress | None
"""One number, a half-open slice (negative bounds count from the end), a set, a progress interval, or None for all."""


@dataclass(frozen=True)
class Which:
    """Branches by field; None does not ask."""

    prompt: int | None = None
    segment: int | None = None
    role: str | None = None
    guided: bool | None = None
    copy: int | None = None

    def __call__(self, branch: Branch) -> bool:
        asked = {name: value for name, value in vars(self).items() if value is not None}
        return all(getattr(branch, name) == value for name, value in asked.items())


@dataclass(frozen=True)
class Where:
    """Which calls, heads and branches a handler is for. Everything left out means all.

    `branches` is a `Which` or any function of a `Branch`; `kinds` are some of KINDS.
    """

    steps: Span = None
    layers: Span = None
    heads: Span = None
    turns: Span = None
    branches: Callable[[Branch], bool] | None = None
    kinds: Collection[str] | None = None

    def __post_init__(self) -> None:
        unknown = sorted(set(self.kinds or ()) - set(KINDS))
        if isinstance(self.kinds, str) or unknown:
            raise UsageError(f"Kinds of attention must be a set of {', '.join(KINDS)}. Got {self.kinds!r}.")

    def at(self, site: Site, steps: int, layers: int) -> bool:
        """Whether the call at `site` is selected, in a run of `steps` steps on a model of `layers` layers."""
        return (
            site.step in chosen(self.steps, steps)
            and site.layer in chosen(self.layers, layers)
            and _in(self.turns, site.turn)
            and (self.kinds is None or site.kind in self.kinds)
        )

    def rows(self, branches: Collection[Branch]) -> tuple[int, ...]:
        """Batch entries whose branch is selected."""
        return tuple(i for i, branch in enumerate(branches) if self.branches is None or self.branches(branch))

    def head_list(self, heads: int) -> tuple[int, ...]:
        """Selected heads, ascending."""
        return chosen(self.heads, heads)


def chosen(span: Span, n: int) -> tuple[int, ...]:
    """The numbers of 0 .. n-1 a span selects, ascending.

    Raises:
        UsageError: a single number or a member of a set lies outside.
    """
    if span is None:
        return tuple(range(n))
    if isinstance(span, slice):
        return tuple(range(*span.indices(n)))
    if isinstance(span, Progress):
        return tuple(i for i in range(n) if span.start <= i / n < span.stop)
    wanted = {int(i) for i in _members(span)}
    outside = sorted(i for i in wanted if not -n <= i < n)
    if outside:
        raise UsageError(f"A selection must lie in 0 to {n - 1}. Got {outside}. Choose among those {n}.")
    return tuple(sorted(i % n for i in wanted))


def _in(span: Span, value: int) -> bool:
    """For axes without a known length: turns."""
    if span is None:
        return True
    if isinstance(span, slice):
        start, stop = span.start or 0, value + 1 if span.stop is None else span.stop
        if min(start, stop) < 0 or span.step not in (None, 1):
            raise UsageError(f"Turns must be counted from the first, one by one. Got {span}. Write slice(1, None).")
        return start <= value < stop
    if isinstance(span, Progress):
        raise UsageError("Turns must be selected by number or range. Got a progress interval.")
    return value in _members(span)


def _members(span: int | Collection[int]) -> Collection[int]:
    """A set of numbers, also of one; numpy's integers count."""
    return span if isinstance(span, Collection) else (int(span),)
