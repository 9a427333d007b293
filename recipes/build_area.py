"""Areas, masks, branches and strengths of a recipe as `control` takes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor

from control.address import Area, Found, Side, inside
from control.concept import ConceptMask
from control.extract import ExtractMask
from control.strength import Ramp, Strength
from probe import region
from probe.call import AttentionCall
from probe.errors import UsageError
from probe.layout import Grid, TokenLayout
from probe.region import Region
from probe.site import Branch, Where
from recipes.language import area as spec
from recipes.language import span
from recipes.language.maskvalues import array_of

PLAIN: Mapping[str, Callable[[], Region]] = {
    "video": region.video,
    "text": lambda: ~region.video(),
    "prompt_text": region.text,
    "padding": region.padding,
}
"""The areas that every model has."""

_DIRECTIONS = {
    ("vt", "joint"): "vt",
    ("vt", "text"): "vt_text",
    ("tv", "joint"): "tv",
    ("tv", "video"): "tv_video",
    ("mean", "joint"): "mean",
}
"""What an ExtractMask calls maps of a direction and probabilities."""


@dataclass(frozen=True)
class Branches:
    """Branches of some prompts, of one half of guidance, of one role; None does not ask. An interpolated branch
    counts as its nearest prompt.
    """

    prompts: tuple[int, ...] | None = None
    guided: bool | None = None
    role: str | None = None

    def __call__(self, branch: Branch) -> bool:
        return (
            (self.prompts is None or branch.nearest in self.prompts)
            and self.guided in (None, branch.guided)
            and self.role in (None, branch.role)
        )


@dataclass(frozen=True)
class Joined(Found):
    """Tokens inside of all areas, or of any of them; of soft weights the least, or the largest."""

    areas: tuple[Area, ...]
    every: bool

    def inside(self, call: AttentionCall, entry: int, side: Side) -> Tensor:
        """bool, one per row or column; weights where one of the areas is soft."""
        given = [
            area.inside(call, entry, side) if isinstance(area, Found) else inside(area, call, entry, side)
            for area in self.areas
        ]
        kind = next((one.dtype for one in given if one.dtype != torch.bool), torch.bool)
        return reduce(torch.minimum if self.every else torch.maximum, [one.to(kind) for one in given])

    def __str__(self) -> str:
        return f"({(' & ' if self.every else ' | ').join(map(str, self.areas))})"


def joined(areas: Sequence[Area], every: bool) -> Area:
    """What is inside of all areas, or of any of them."""
    if all(isinstance(area, Region) for area in areas):
        return reduce(lambda a, b: a & b if every else a | b, areas)  # type: ignore[operator]
    return Joined(tuple(areas), every)


def on_video(area: spec.Area) -> bool:
    """Whether an area is a part of the video."""
    if isinstance(area, str):
        return area not in PLAIN
    if isinstance(area, spec.Not):
        return on_video(area.area)
    if isinstance(area, spec.All | spec.AnyOf):
        return all(map(on_video, area.all if isinstance(area, spec.All) else area.any))
    return isinstance(area, spec.Frames | spec.Box)


def needed(area: object) -> set[str]:
    """The names without which nothing is inside of an area."""
    if isinstance(area, str):
        return {area}
    if isinstance(area, spec.Not):
        return needed(area.area)
    return set().union(*map(needed, area.all)) if isinstance(area, spec.All) else set()


def cells(area: spec.Frames | spec.Box, grid: Grid) -> Region:
    """Frames or a box of a grid.

    Raises:
        UsageError: the grid does not have them.
    """
    if isinstance(area, spec.Frames):
        if area.frames[1] > grid.frames:
            raise UsageError(
                f"frames must lie within [0, {grid.frames}), token frames of this video. Got {list(area.frames)}. "
                "Count token frames, not pixel frames."
            )
        return region.frames(*area.frames)
    if area.box[2] > grid.height or area.box[3] > grid.width:
        raise UsageError(
            f"A box must lie within {grid.height} rows and {grid.width} columns of patches. Got {list(area.box)}. "
            "Count patches, not pixels."
        )
    return region.box(*area.box)


def refuse_empty(area: Area, layout: TokenLayout) -> None:
    """Nothing, for a part of the video that has tokens or is found while the model runs.

    Raises:
        UsageError: it has none.
    """
    if isinstance(area, Region) and not area.mask(layout).any():
        raise UsageError(f"An area must have a token of the video. Got {area}, which has none. Widen its parts.")


def from_file(mask: spec.FileMask, grid: Grid) -> Region:
    """A mask that came with the recipe; a single frame is that of every frame.

    Raises:
        UsageError: it is not of the size of the grid, or has nothing inside.
    """
    inside = array_of(mask)
    if inside.shape[0] == 1:
        inside = np.repeat(inside, grid.frames, 0)
    if inside.shape != grid.shape:
        raise UsageError(
            f"A mask must have the size of the token grid, {grid}, or be one frame of it. Got "
            f"{'x'.join(map(str, inside.shape))}. Resize it."
        )
    if not inside.any():
        raise UsageError(f"A mask must have a token inside. Got 0 of {inside.size}. Draw it again, or leave it out.")
    return region.tokens(inside)


def extracted(mask: spec.WordMask, source: int | None, where: Where, video: int | None = None) -> ExtractMask:
    """A mask that a run finds in its own attention, by the outputs of prompt `video` if that is given.

    Raises:
        UsageError: probabilities that its direction does not have.
    """
    if (mask.direction, mask.probabilities) not in _DIRECTIONS:
        raise UsageError(
            f"Probabilities of direction {mask.direction} must be joint, or of the columns it looks at (vt: text, tv: "
            f"video). Got {mask.probabilities}. Take joint."
        )
    direction: Any = _DIRECTIONS[mask.direction, mask.probabilities]
    method, value = ("top", mask.top) if mask.top is not None else ("threshold", mask.threshold)
    if value == "otsu":
        method, value = "otsu", None
    settings: dict[str, Any] = {"method": method, "value": value, "per": mask.normalise}
    settings |= {"sigma": mask.blur, "component": mask.largest, "soft": mask.soft, "where": where}
    if video is not None:
        return ConceptMask(mask.phrases, source, tuple(mask.rivals), video=video, **settings)
    return ExtractMask(mask.phrases, source, tuple(mask.rivals), direction, propagate=mask.propagate, **settings)


def strength_of(strength: span.Strength) -> Strength:
    """A number, or a function of progress."""
    if isinstance(strength, span.Ramp):
        return Ramp(strength.first, strength.last, strength.start, strength.stop, strength.shape)
    return float(strength)
