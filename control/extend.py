"""Extend: further keys and values join the softmax, of another branch, pooled, or one that is always the same."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from control.address import Area, inside
from control.bank import Given
from control.constant import Constant
from control.source import Ask, OfBranch, Peer, Source
from control.source_area import inside_source
from control.taking import Taking
from probe import attend
from probe.call import AttentionCall
from probe.change import Added
from probe.errors import LayoutError, UsageError
from probe.layout import TokenLayout
from probe.region import Region, video

_ALL = video() | ~video()
"""All tokens that may be seen."""


@dataclass(eq=False)
class Extend(Taking):
    """softmax over [L, L' + bias + log strength], L' = q k', with keys k' and values v' of the `columns` of a source:
    the odds of the added columns are multiplied by exp(bias) and by the strength.

    `source` is a prompt index, a function from a target's branch to its source's, or a Source (`Peer`, `Itself`,
    `Stored`), which gives unedited tensors; a branch whose peer is itself is left alone. `target` is a prompt index, or
    None for every branch `where` selects. It is the concatenation of keys in mutual self-attention and in shared
    attention (ConsiStory, StyleAligned, there of a whole batch). Keys keep the position they were rotated to; padding
    that a source may not see is left out.

    - `Constant("zero")` adds one null key: its logit is `bias`, its value 0, a sink that takes mass and gives nothing.
      `Constant("mean")` gives it the mean of the target's own values in `columns`, a tensor [D] or [H, D] that value.
      It joins where the target has a token in `columns`: use None or text() in cross attention, which has no video.
    - `pool=(1, 4, 4)` with `Itself()` averages video keys and values over cells of frames, rows and columns of the
      grid, and adds one key for each: CLEAR's pooled keys (arXiv 2412.16112), beside a `Window`; there after a
      fine-tuning. A cell takes its tokens in `columns`, and may be smaller at the edge of the grid. Keys are averaged
      as they are rotated. A `bias` of log 16 gives a key the weight of 16 tokens.

    `rows` see the added keys, all rows if None. Windows and biases do not hide them. Words in `columns` are those of
    the source's prompt; the unconditional half shows none, and adds nothing. Several at a place compose.

    Raises:
        UsageError: a bias that is not a number, a pool with another shape or without video, a negative strength.
        PlanError: (when served) the source is not there.
        WordError: (when served) the prompt of the source lacks a word; lists the words of the prompt.
    """

    source: int | OfBranch | Source
    target: int | None = None
    columns: Area | None = field(default_factory=video, kw_only=True)
    bias: float = field(default=0.0, kw_only=True)
    pool: tuple[int, int, int] | None = field(default=None, kw_only=True)
    touches = frozenset({"added"})
    rank = 3
    composes = True

    def __post_init__(self) -> None:
        if not math.isfinite(self.bias):
            raise UsageError(f"The bias of added keys must be a number. Got {self.bias:g}. Leave the edit out instead.")
        if self.pool is not None and (len(self.pool) != 3 or min(self.pool) < 1):
            raise UsageError(
                f"A pool must be (frames, rows, columns) of 1 or more. Got {self.pool}. CLEAR uses (1, 4, 4)."
            )
        self.takes("kv")
        self._area = _ALL if self.columns is None else self.columns
        if isinstance(self._from, Constant) and isinstance(self._from.value, Tensor) and self._from.value.dim() > 2:
            raise UsageError(
                "A constant key must have a value [D] or [H, D]. Got one for each token. Add a single key."
            )

    def apply(self, call: AttentionCall, entry: int, amount: float) -> None:
        """Add the keys and values of the source to one entry."""
        if amount < 0:
            raise UsageError(
                f"The strength of added keys must be 0 or more. Got {amount:g} for {self}. 1 adds them once."
            )
        given, rows = self._from.given(call, entry, self._ask(call)), inside(self.rows, call, entry)
        if given is None or self._is_itself(call, entry, given) or not rows.any():
            return
        k, v = self._added(call, given)
        if k.shape[1]:
            bias, seen = self.bias + math.log(amount), None if rows.all() else rows
            call.change(Added(entry=entry, heads=self.heads(call), k=k, v=v, bias=bias, rows=seen))

    def cost(self, layout: TokenLayout) -> float:
        """The added keys."""
        if isinstance(self._from, Constant):
            return 1 / layout.total
        if self.pool is not None:
            return math.prod(-(-n // size) for n, size in zip(layout.grid.shape, self.pool, strict=True)) / layout.total
        try:
            return float(self._area.mask(layout).mean()) if isinstance(self._area, Region) else 1.0
        except LayoutError:  # words are only known with the prompt
            return layout.text / layout.total

    def _added(self, call: AttentionCall, given: Given) -> tuple[Tensor, Tensor]:
        """Keys and values [h, m, D]."""
        k, v = (given.take(name, self.heads(call)) for name in "kv")
        columns = inside_source(self._area, call, given, "columns")
        if isinstance(self._from, Constant):  # the same for every column
            one = slice(int(columns.any()))
            return torch.zeros_like(k[:, one]), v[:, one]
        if self.pool is None or not given.columns.video:
            return k[:, columns], v[:, columns]
        return _pooled(k, columns, given.columns, self.pool), _pooled(v, columns, given.columns, self.pool)

    def _ask(self, call: AttentionCall) -> Ask:
        return Ask("kv", self.heads(call), self._area)

    def _is_itself(self, call: AttentionCall, entry: int, given: Given) -> bool:
        return isinstance(self._from, Peer) and (given.site, given.branch) == (call.site, call.branches[entry])

    def __str__(self) -> str:
        pool = "" if self.pool is None else f" pooled by {'x'.join(map(str, self.pool))}"
        target = "" if self.target is None else f" to prompt {self.target}"
        return f"Extend({self.columns or 'all'} of {self._from}{pool}{target})"


def _pooled(x: Tensor, columns: Tensor, side: TokenLayout, pool: tuple[int, int, int]) -> Tensor:
    """Means of [h, M, D] over the tokens in `columns` of each cell of the grid that has some, [h, m, D]."""
    chosen = columns[side.video_slice].to(attend.exact_dtype(x.dtype))
    values = torch.cat([x[:, side.video_slice] * chosen[:, None], chosen[:, None].expand(len(x), -1, 1)], -1)
    size = [min(n, most) for n, most in zip(pool, side.grid.shape, strict=True)]
    cells = F.avg_pool3d(values.mT.unflatten(-1, side.grid.shape), size, ceil_mode=True, count_include_pad=False)
    cells = cells.flatten(2).mT
    cells = cells[:, cells[0, :, -1] > 0]
    return (cells[..., :-1] / cells[..., -1:]).to(x.dtype)
