"""Rotate: queries and keys of the video at another position than where their tokens stand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from control.address import Area, inside
from control.edit import Edit
from probe.call import AttentionCall
from probe.entry import index_of, on_device
from probe.errors import PlanError, UsageError
from probe.models.rope import Band, Rope
from probe.region import video
from probe.site import JOINT

Positions = Tensor | Callable[[Tensor], Tensor]
"""Positions [N_video, 3] in tokens along t, y, x, or a function from where the tokens stand to where they shall."""

AXES = (0, 1, 2)


@dataclass(eq=False)
class Rotate(Edit):
    """The video rows of `tensors` ("q", "k" or "qk") turn as if their tokens stood elsewhere.

    One of: `shift`, tokens along t, y, x; `remap`, new positions or a function of the old ones; `drop`, no rotation at
    all. `axes` (0 t, 1 y, 2 x) and `band`, ("low" or "high", share of each axis's frequencies), turn that part of the
    rotation alone. The strength multiplies the distance. Rotations of one tensor compose in any order; a row that does
    not move keeps its bits.

    Only differences of positions count between video tokens: a shift of q and k together leaves them as they were, and
    shifts the video against the text alone; K shifted by d is Q shifted by -d. FreeFlux (arXiv 2503.16153) probes how
    much a layer rests on positions with K alone: `Rotate("k", drop=True)`, and shifts (0, 10, 10), (0, 0, 20) and
    (0, 64, 0).

    Raises:
        UsageError: no tensor or an unknown one, not one of the three, an unknown axis or band.
        PlanError: (when served) the model does not rotate queries and keys.
    """

    tensors: str = "k"
    shift: tuple[float, float, float] | None = None
    remap: Positions | None = None
    drop: bool = False
    axes: tuple[int, ...] = AXES
    band: Band | None = None
    rows: Area | None = field(default_factory=video, kw_only=True)
    rank = 1
    composes = True
    kinds = JOINT | {"self"}

    def __post_init__(self) -> None:
        if not self.tensors or set(self.tensors) - set("qk"):
            raise UsageError(f"A Rotate must name tensors among q, k. Got {self.tensors!r}. Write for example 'k'.")
        if (self.shift is not None) + (self.remap is not None) + self.drop != 1:
            raise UsageError(f"A Rotate must have one of shift, remap and drop. Got {self._what()}. Give one.")
        if not self.axes or set(self.axes) - set(AXES):
            raise UsageError(f"The axes of a Rotate must be among 0 (t), 1 (y) and 2 (x). Got {self.axes}.")
        if self.band is not None and (self.band[0] not in ("low", "high") or not 0 < self.band[1] <= 1):
            raise UsageError(f"A band must be 'low' or 'high' and a share in 0 to 1. Got {self.band}.")
        self.touches = frozenset(self.tensors)

    def __str__(self) -> str:
        return f"Rotate({self.tensors} {self._what()})"

    def apply(self, call: AttentionCall, entry: int, amount: float) -> None:
        """Turn the rows of one batch entry; tensors [B, H, N, D]."""
        if call.rope is None:
            raise PlanError(
                f"{self} must be used on a model that rotates queries and keys by position. Got one that does not, at "
                f"{call.site}: its positions are added to its input. Choose a model with RoPE."
            )
        heads, rows = self.heads(call), call.rows.video_slice
        chosen = inside(self.rows, call, entry)[rows].unsqueeze(-1)
        delta, part = amount * self._distance(call.rope, call), call.rope.only(self.axes, self.band)
        some = index_of(heads, call.q.device)
        for name in self.tensors:
            tensor = call.writable(name)
            here = tensor[entry, some][:, rows]
            tensor[entry, some, rows] = torch.where(chosen, part.turn(here, delta, heads), here)

    def _distance(self, rope: Rope, call: AttentionCall) -> Tensor:
        """How far each video token moves, [N_video, 3] or [1, 3]."""
        if self.shift is not None:
            return on_device(self.shift, torch.float32, call.q.device).unsqueeze(0)
        stand = rope.positions(call.rows)
        if self.drop:
            return -stand
        wanted = self.remap(stand) if callable(self.remap) else self.remap
        if wanted is None or wanted.shape != stand.shape:
            raise UsageError(
                f"A remap must give positions {tuple(stand.shape)}. Got "
                f"{None if wanted is None else tuple(wanted.shape)}. Give t, y and x of each video token."
            )
        return wanted.to(stand) - stand

    def _what(self) -> str:
        told = [f"shift {self.shift}"] * (self.shift is not None) + ["remap"] * (self.remap is not None)
        return ", ".join(told + ["drop"] * self.drop) or "none"
