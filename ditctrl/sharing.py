"""KV sharing: where it happens, which branch reads from which, and which branches a step needs."""

from __future__ import annotations

from dataclasses import dataclass

from control.transfer import Transfer
from ditctrl.segment import Segments
from probe.site import Branch, Where, Which


@dataclass(frozen=True)
class Window:
    """Half-open ranges of steps and layers in which keys and values are shared."""

    steps: range
    layers: range

    @classmethod
    def scaled(cls, steps: int, layers: int) -> Window:
        """The authors' window, steps [2, 25) of 50 and layers [25, 30) of 30 (DC:1404-1405), carried over to K steps
        and L layers.

        [round(K / 25), round(K / 2)) and the last max(1, round(L / 6)).
        """
        return cls(range(round(steps / 25), round(steps / 2)), range(layers - max(1, round(layers / 6)), layers))


def share_previous(segments: Segments, window: Window, tensors: str = "kv") -> Transfer:
    """The target role of each segment reads keys and values of the source role of the one before, in both guidance
    halves.

    The source role is plain attention, so there is no chain within a step (DC:1525-1570, unmasked form).
    """

    def previous_segment(branch: Branch) -> Branch:
        return _branch(segments, branch.segment - 1, "source", branch.guided)

    where = Where(steps=window.steps, layers=window.layers, branches=Which(role="target"))
    return Transfer(tensors, source=previous_segment, where=where)


def branches(segments: Segments, window: Window | None, step: int) -> list[Branch]:
    """The conditional branches of a step in batch order.

    Inside the window: sources 0 .. S-2, then targets 1 .. S-1, as the pair loop evaluates them. Outside, both roles
    of a segment are the same function of the same input, so each segment is evaluated once.
    """
    if window is None or step not in window.steps:
        return [_branch(segments, k, "plain") for k in range(segments.count)]
    sources = [_branch(segments, k, "source") for k in range(segments.count - 1)]
    return sources + [_branch(segments, k, "target") for k in range(1, segments.count)]


def clip_forwards(segments: Segments, window: Window | None, steps: int) -> list[int]:
    """Transformer evaluations of single clips in each step, both guidance halves."""
    return [2 * len(branches(segments, window, step)) for step in range(steps)]


def _branch(segments: Segments, segment: int, role: str, guided: bool = True) -> Branch:
    prompt, mix = segments.condition(segment)
    return Branch(prompt, segment, role, guided, mix)
