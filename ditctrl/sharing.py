"""KV sharing: where it happens, which branch reads from which, and what a step has to evaluate."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from control.source import Peer
from control.transfer import Transfer
from ditctrl.segment import Segments, Variant
from probe.site import Branch, Span, Where, Which


@dataclass(frozen=True)
class Window:
    """Half-open ranges of steps and layers in which keys and values are shared."""

    steps: range
    layers: range

    @classmethod
    def scaled(cls, steps: int, layers: int, variant: Variant = "code") -> Window:
        """The authors' window, steps [2, 25) of 50 and layers [25, 30) of 30 (DC:1404-1405), carried over to K steps
        and L layers.

        [round(K / 25), round(K / 2)), at least one step, and the last max(1, round(L / 6)): 7 of the 42 layers of
        CogVideoX-5B, for which the authors give none. The paper's [2, 25] includes its last step.
        """
        start = round(steps / 25)
        stop = max(start + 1, round(steps / 2) + (variant == "paper"))
        return cls(range(start, min(stop, steps)), range(layers - max(1, round(layers / 6)), layers))


@dataclass(frozen=True)
class Chunks:
    """How the segments of a step are spread over forwards: `size` at a time, all at once if None.

    Where a chunk begins, the keys and values of the segment before it are kept from the last forward, on `device` (None
    where they are), or, with `again`, made once more: a source's row is then evaluated twice.
    """

    size: int | None = None
    device: str | None = None
    again: bool = False


@dataclass(frozen=True)
class Turn:
    """The conditional branches of one forward, in batch order. The first `borrowed` only lend keys and values: their
    predictions were counted in the forward before.
    """

    branches: tuple[Branch, ...]
    borrowed: int = 0

    @property
    def alike(self) -> tuple[int, ...]:
        """For each branch the first one of its segment: both roles start from the same input."""
        segments = [branch.segment for branch in self.branches]
        return tuple(segments.index(segment) for segment in segments)


def share_previous(
    segments: Segments, tensors: str = "kv", chunks: Chunks | None = None, *, where: Where, **more: Any
) -> Transfer:
    """The target role of each segment reads keys and values of the source role of the one before, in both guidance
    halves; `where` is `shared_where` of a window.

    The source role is plain attention, so there is no chain within a step (DC:1525-1570, unmasked form). A source of an
    earlier forward of the step is kept until it is taken, unless `chunks` evaluate it again. `more` is passed to the
    Transfer.
    """
    chunks = chunks or Chunks()
    kept = None if chunks.again else Which(role="source")
    source = Peer(segments.previous_segment, among=kept, once=True, device=chunks.device)
    return Transfer(tensors, source=source, where=where, **more)


def shared_where(window: Window, heads: Span = None) -> Where:
    """The targets inside a window."""
    return Where(steps=window.steps, layers=window.layers, heads=heads, branches=Which(role="target"))


def turns(segments: Segments, window: Window | None, step: int, chunks: Chunks | None = None) -> list[Turn]:
    """The forwards of a step.

    Inside the window: sources 0 .. S-2, then targets 1 .. S-1, as the pair loop evaluates them, chunk by chunk.
    Outside, both roles of a segment are the same function of the same input, so each segment is evaluated once.
    """
    chunks = chunks or Chunks()
    size = chunks.size or segments.count
    shared = window is not None and step in window.steps
    made = []
    for start in range(0, segments.count, size):
        inside = range(start, min(start + size, segments.count))
        made.append(_roles(segments, inside, chunks.again) if shared else _once(segments, inside))
    return made


def branches(segments: Segments, window: Window | None, step: int) -> list[Branch]:
    """The conditional branches of a step whose predictions count."""
    return [branch for turn in turns(segments, window, step) for branch in turn.branches]


def layer_passes(
    segments: Segments, window: Window | None, steps: int, layers: int, chunks: Chunks | None = None
) -> list[int]:
    """Evaluations of one layer for one clip in each step, both guidance halves: until the first shared layer a segment
    is evaluated once, from there on in each of its roles.
    """
    return [
        sum(_passes(turn, window, layers) for turn in turns(segments, window, step, chunks)) for step in range(steps)
    ]


def reference_passes(segments: Segments, steps: int, layers: int) -> int:
    """The same of the authors' pair loop in all steps: four clips per pair of neighbours (SA:749-764)."""
    return 4 * (segments.count - 1) * steps * layers


def _passes(turn: Turn, window: Window | None, layers: int) -> int:
    fork = layers if window is None else window.layers.start
    return 2 * (fork * len(set(turn.alike)) + (layers - fork) * len(turn.branches))


def _roles(segments: Segments, inside: range, again: bool) -> Turn:
    first = inside.start - 1 if again and inside.start else inside.start
    sources = [segments.branch(k, "source") for k in range(first, min(inside.stop, segments.count - 1))]
    targets = [segments.branch(k, "target") for k in inside if k]
    return Turn((*sources, *targets), inside.start - first)


def _once(segments: Segments, inside: range) -> Turn:
    return Turn(tuple(segments.branch(k, "plain") for k in inside))


def unconditional(branch: Branch) -> Branch:
    """Its other half of guidance."""
    return replace(branch, guided=False)
