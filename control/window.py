"""Windows: each video token sees the keys near it. Their sizes come from the layout of the call."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from control.bias import along
from control.weighting import Weighting, by_group, cost_of
from probe.call import AttentionCall
from probe.change import Change
from probe.errors import UsageError
from probe.layout import Grid, TokenLayout
from probe.region import Region, frames, video
from probe.site import JOINT

Shape = Literal["circle", "square"]
Sight = Callable[[Tensor, Tensor], Tensor]
"""Whether row groups i [n, 1] see column groups j [1, m]."""


@dataclass(eq=False, kw_only=True)
class Nearby(Weighting):
    """A window among the video tokens. Text is always seen and sees everything, and so does what lies outside of
    `rows`; with `first_frame` the keys of frame 0 are always seen too. The strength, 0 to 1, hides softly: the odds of
    keys outside of the window are multiplied by 1 - strength, and rows keep their unit sum.

    Raises:
        UsageError: (when served) a strength outside 0 to 1.
    """

    first_frame: bool = False
    kinds = JOINT | {"self"}

    def sights(self, call: AttentionCall) -> Iterable[tuple[Tensor, Sight]]:
        """Groups of the video tokens, long [N_video], and which see which; all of these must see a key."""
        raise NotImplementedError

    def groups(self, grid: Grid) -> int:
        """How many groups there are at most."""
        raise NotImplementedError

    def changes(self, call: AttentionCall, entry: int, amount: float) -> tuple[Change, ...]:
        """A table of groups where these are few, else a mask."""
        if not 0 <= amount <= 1:
            raise UsageError(f"The strength of a window must lie in 0 to 1. Got {amount:g} for {self}. 1 hides fully.")
        made: list[Change] = []
        for group, sees in self.sights(call):
            hide = _hiding(sees, math.log1p(-amount) if amount < 1 else -math.inf)
            made += by_group(self, call, entry, group, hide, self._keys)
        return tuple(made)

    def cost(self, layout: TokenLayout) -> float:
        """A mask, where groups are many."""
        return cost_of(self.groups(layout.grid))

    @property
    def _keys(self) -> Region | None:
        """The columns that can be hidden."""
        return video() & ~frames(0) if self.first_frame else None


@dataclass(eq=False)
class Window(Nearby):
    """Video tokens see the keys at most `frames` frames away (0: their own frame), and within `radius` patches in the
    plane, in every frame of these; None does not limit.

    The radius is strict, as in CLEAR (arXiv 2412.16112), which uses 8, 16 and 32 on FLUX after a fine-tuning: a circle
    is dy^2 + dx^2 < radius^2, a square |dy| < radius and |dx| < radius. Without training, a sweep of the radius
    measures how local a head is. CLEAR's pooled keys are an `Extend` with `pool` beside it.

    Frames alone are a table, and less work than the plain attention; a radius is a mask where positions are many. Two
    windows at a place multiply: a key must lie in both.

    Raises:
        UsageError: no limit, negative frames, a radius that is not positive, or another shape.
    """

    frames: int | None = None
    radius: float | None = None
    shape: Shape = "circle"

    def __post_init__(self) -> None:
        few = self.frames is not None and self.frames < 0
        small = self.radius is not None and not self.radius > 0
        if few or small or (self.frames is None and self.radius is None) or self.shape not in ("circle", "square"):
            raise UsageError(
                "A window must have frames of 0 or more, or a radius above 0, and be a circle or a square. Got frames "
                f"{self.frames}, radius {self.radius} and {self.shape!r}. Window(frames=1) sees the frames beside its "
                "own."
            )

    def sights(self, call: AttentionCall) -> Iterable[tuple[Tensor, Sight]]:
        """By frame, and by position."""
        grid, device = call.layout.grid, call.q.device
        if (most := self.frames) is not None:
            yield along(grid, (0,), device)[1], lambda i, j: (i - j).abs() <= most
        if (radius := self.radius) is not None:
            places, group = along(grid, (1, 2), device)
            yield group, lambda i, j: _within((places[i] - places[j])[..., 1:].abs(), radius, self.shape)

    def groups(self, grid: Grid) -> int:
        """Frames, or positions."""
        return grid.frames if self.radius is None else grid.patches

    def __str__(self) -> str:
        limits = [] if self.frames is None else [f"{self.frames} frames"]
        limits += [] if self.radius is None else [f"{self.shape} of radius {self.radius:g}"]
        return f"Window({', '.join(limits)})"


@dataclass(eq=False)
class Band(Nearby):
    """Video tokens see the keys less than `width` frames' worth of tokens away, when they are counted frame by frame
    ("spatial": near places of its own and the next frames) or place by place ("temporal": near places in all frames).

    These are the two masks of Sparse VideoGen (arXiv 2502.01776), |i - j| < 1.5 S with S the tokens of a frame; on Wan
    it uses 2 S and `first_frame`. It counts in blocks of 128 tokens, as its kernels do:
    |i // block - j // block| < width S / block. Here `block` is 1, exact to the token; blocks are counted within the
    video. Its choice between the two masks, for each head by the error on sampled rows, and its dense first steps are a
    matter of `where`. Both bands keep about 2 width / frames of the video pairs.

    Raises:
        UsageError: a width that is not positive, a block below 1, or another order.
    """

    width: float = 1.5
    order: Literal["spatial", "temporal"] = "spatial"
    block: int = 1

    def __post_init__(self) -> None:
        if not self.width > 0 or self.block < 1 or self.order not in ("spatial", "temporal"):
            raise UsageError(
                "A band must have a width above 0, blocks of 1 token or more, and be spatial or temporal. Got "
                f"{self.width}, {self.block} and {self.order!r}. Widths are in frames."
            )

    def sights(self, call: AttentionCall) -> Iterable[tuple[Tensor, Sight]]:
        """By block."""
        grid = call.layout.grid
        numbers = torch.arange(grid.size, device=call.q.device)
        if self.order == "temporal":
            numbers = numbers.view(grid.patches, grid.frames).mT.reshape(-1)
        reach = self.width * grid.patches
        yield numbers // self.block, lambda i, j: (i - j).abs() * self.block < reach

    def groups(self, grid: Grid) -> int:
        """Blocks."""
        return -(-grid.size // self.block)

    def __str__(self) -> str:
        return f"Band({self.order}, {self.width:g} frames)"


def _within(distance: Tensor, radius: float, shape: Shape) -> Tensor:
    """Whether distances (y, x) [..., 2] are below the radius."""
    return distance.square().sum(-1) < radius**2 if shape == "circle" else (distance < radius).all(-1)


def _hiding(sees: Sight, outside: float) -> Sight:
    """Biases: 0 for what is seen."""
    return lambda i, j: torch.where(sees(i, j), 0.0, outside)
