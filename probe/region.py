"""Symbolic token sets: described by what they are, turned into indices only once a layout is given. No torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from probe.errors import LayoutError
from probe.layout import TokenLayout
from probe.word import Prompt

Mask = NDArray[np.bool_]
_Rule = Callable[[TokenLayout, "Prompt | None"], Mask]


@dataclass(frozen=True)
class Region:
    """A set of tokens of the joint sequence. `a | b` joins, `a & b` intersects, `~a` is the rest.

    Build one with the functions of this module: `text()`, `padding()`, `video()`, `words("cat")`, `frames(0, 4)`,
    `box(...)`, `tokens(mask)`.
    """

    label: str
    rule: _Rule

    def __or__(self, other: Region) -> Region:
        return Region(f"({self.label} | {other.label})", lambda lay, p: self.rule(lay, p) | other.rule(lay, p))

    def __and__(self, other: Region) -> Region:
        return Region(f"({self.label} & {other.label})", lambda lay, p: self.rule(lay, p) & other.rule(lay, p))

    def __invert__(self) -> Region:
        return Region(f"~{self.label}", lambda lay, p: ~self.rule(lay, p))

    def __repr__(self) -> str:
        return self.label

    def mask(self, layout: TokenLayout, prompt: Prompt | None = None) -> Mask:
        """bool [total], True = inside. `prompt` is needed by words and padding only."""
        return self.rule(layout, prompt)

    def indices(self, layout: TokenLayout, prompt: Prompt | None = None) -> NDArray[np.intp]:
        """The token positions inside, ascending."""
        return np.flatnonzero(self.mask(layout, prompt))


@dataclass(frozen=True)
class Block:
    """A region of the attention matrix: `rows` look (queries), `columns` are looked at (keys)."""

    rows: Region
    columns: Region

    def __repr__(self) -> str:
        return f"{self.rows} x {self.columns}"


def _slice_rule(pick: Callable[[TokenLayout], slice]) -> _Rule:
    def rule(layout: TokenLayout, _: Prompt | None) -> Mask:
        inside = np.zeros(layout.total, bool)
        inside[pick(layout)] = True
        return inside

    return rule


def _text_rule(choose: Callable[[Prompt], NDArray[np.bool_]], what: str) -> _Rule:
    def rule(layout: TokenLayout, prompt: Prompt | None) -> Mask:
        if not layout.text:
            return np.zeros(layout.total, bool)
        if prompt is None or len(prompt.ids) != layout.text:
            raise LayoutError(
                f"{what} must come with the prompt of the branch, {layout.text} tokens long. Got "
                f"{'none' if prompt is None else len(prompt.ids)}. Tell the trace its prompts."
            )
        inside = np.zeros(layout.total, bool)
        inside[layout.text_slice] = choose(prompt)
        return inside

    return rule


def text() -> Region:
    """Real text tokens, the end token included, padding excluded."""
    return Region("text", _text_rule(lambda prompt: ~np.array(prompt.padding), "text()"))


def padding() -> Region:
    """Text positions after the end of the prompt. CogVideoX does not mask them: they are attended."""
    return Region("padding", _text_rule(lambda prompt: np.array(prompt.padding), "padding()"))


def video() -> Region:
    """All video tokens."""
    return Region("video", _slice_rule(lambda layout: layout.video_slice))


def words(*phrases: str) -> Region:
    """The tokens of the given words of the prompt."""

    def choose(prompt: Prompt) -> NDArray[np.bool_]:
        inside = np.zeros(len(prompt.ids), bool)
        for phrase in phrases if prompt.text else ():
            inside[list(prompt.tokens_of(phrase))] = True
        return inside

    return Region(f"words({', '.join(phrases)})", _text_rule(choose, "words()"))


def frames(start: int, stop: int | None = None) -> Region:
    """Token frames start to stop, half-open; one frame when `stop` is left out."""
    last = (start + 1 if stop is None else stop) - 1

    def pick(layout: TokenLayout) -> slice:
        if not layout.video:
            return slice(0, 0)
        return slice(layout.frame_slice(start).start, layout.frame_slice(last).stop)

    return Region(f"frames({start}:{last + 1})", _slice_rule(pick))


def box(top: int, left: int, bottom: int | None = None, right: int | None = None) -> Region:
    """A rectangle of patches in every frame, half-open, in token rows and columns; None: to the last one.

    Raises:
        LayoutError: (when looked up) it is empty, or does not lie within the grid.
    """

    def rule(layout: TokenLayout, _: Prompt | None) -> Mask:
        rows, columns = layout.grid.height, layout.grid.width
        last, end = rows if bottom is None else bottom, columns if right is None else right
        if layout.video and not (0 <= top < last <= rows and 0 <= left < end <= columns):
            raise LayoutError(
                f"A box must lie within {rows} rows and {columns} columns of patches. Got top {top}, left {left}, "
                f"bottom {last}, right {end}. Count patches, not pixels."
            )
        inside = np.zeros(layout.grid.shape, bool)
        inside[:, top:last, left:end] = True
        return _on_video(layout, inside)

    return Region(f"box({top}, {left}, {bottom}, {right})", rule)


def tokens(mask: NDArray[np.bool_]) -> Region:
    """Video tokens by a bool mask [frames, height, width] on the token grid, True = inside."""
    mask = np.asarray(mask, bool)

    def rule(layout: TokenLayout, _: Prompt | None) -> Mask:
        if mask.shape != layout.grid.shape:
            raise LayoutError(f"A token mask must have the grid's shape {layout.grid.shape}. Got {mask.shape}.")
        return _on_video(layout, mask)

    return Region(f"tokens({int(mask.sum())} of {mask.size})", rule)


def _on_video(layout: TokenLayout, inside: Mask) -> Mask:
    full = np.zeros(layout.total, bool)
    if not layout.video:
        return full
    full[layout.video_slice] = inside.reshape(-1)
    return full
