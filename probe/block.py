"""What edits ask for outside of attention: changes of what a module, a feed-forward or a block returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Point = Literal["attention", "feed_forward", "block"]


@dataclass(frozen=True)
class Streams:
    """Rows of the residual stream: video [B, N_video, C] and text [B, N_text, C], None where a module has none."""

    video: Tensor | None
    text: Tensor | None


@dataclass(frozen=True)
class Later:
    """When `point` of this block returns, `change(inputs, outputs)` gives what the model goes on with."""

    point: Point
    change: Callable[[Streams, Streams], Streams]
