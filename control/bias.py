"""Bias: numbers added to the logits, by areas, by a table of areas, or by a function of positions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from control.address import Area, Side, inside
from control.weighting import Weighting, by_group, by_table, cost_of, factor_of
from probe.call import AttentionCall
from probe.change import Change
from probe.errors import UsageError
from probe.layout import Grid, TokenLayout
from probe.site import JOINT

_MOST_AREAS = 62
"""Areas of a table: one bit of a whole number each."""


@dataclass(eq=False)
class Bias(Weighting):
    """L_ij <- L_ij + `value` for the columns j in `columns` (all if None) and the rows i in `rows`.

    The odds of those columns are multiplied by exp(value) and the rows renormalised; -inf hides them. The strength
    multiplies a finite value; at any strength but 0, -inf hides. `Reweight("renormalised")` is the same by its factor.

    Words are looked up in the prompt of each conditional branch. The unconditional half shows none, so that a bias on
    words leaves it alone; a bias on `video()` or frames changes both halves, unless `where` chooses.

    Raises:
        UsageError: a value that is not a number or above 80 / strength, a factor of 5e34.
        PlanError: (when served) it would hide every key of a row.
        WordError: (when served) a conditional prompt it addresses lacks a word; lists the words of the prompt.
    """

    value: float
    columns: Area | None = None

    def __post_init__(self) -> None:
        _refuse(self, self.value)

    def areas(self) -> Iterable[Area | None]:
        """Rows and columns."""
        return self.rows, self.columns

    def changes(self, call: AttentionCall, entry: int, amount: float) -> tuple[Change, ...]:
        """Two groups of columns, two of rows."""
        rows = inside(self.rows, call, entry).long()
        columns = inside(self.columns, call, entry, "columns").long()
        biases = torch.zeros(2, 2, device=call.q.device)
        biases[1, 1] = scaled(self.value, amount)
        return by_table(self, call, entry, rows, columns, factor_of(biases))

    def __str__(self) -> str:
        columns = "all columns" if self.columns is None else str(self.columns)
        return f"Bias({self.value:g} on {columns}{'' if self.rows is None else f' of {self.rows}'})"


@dataclass(eq=False)
class BiasTable(Weighting):
    """L_ij <- L_ij + values[a][b] for rows i in area a and columns j in area b of `groups`.

    `values` is G x G; -inf hides. A token in several areas takes the largest of their values, so that a table of 0 and
    -inf is the OR of its masks. Tokens in no area see all, and are seen by all. The strength multiplies finite values;
    words as in `Bias`. At most 62 areas. A table of G groups is G extra channels of q and k (FlashBias, arXiv
    2505.12044), or one partial attention per pair; no N x N bias is formed.

    Raises:
        UsageError: a table of another shape, too many areas, or a value that is not a number or too large.
        PlanError: (when served) it would hide every key of a row.
        WordError: (when served) a conditional prompt it addresses lacks a word; lists the words of the prompt.
    """

    groups: Sequence[Area]
    values: Sequence[Sequence[float]]
    name: str = field(default="BiasTable", kw_only=True)

    def __post_init__(self) -> None:
        count = len(self.groups)
        if not 0 < count <= _MOST_AREAS or [len(row) for row in self.values] != [count] * count:
            raise UsageError(
                f"A bias table must have one row and one column for each of its areas, 1 to {_MOST_AREAS}. Got "
                f"{count} areas and rows of {[len(row) for row in self.values]}. Give values[a][b] for each pair."
            )
        for row in self.values:
            for value in row:
                _refuse(self, value)

    def areas(self) -> Iterable[Area | None]:
        """The groups, and the rows it is limited to."""
        return self.rows, *self.groups

    def changes(self, call: AttentionCall, entry: int, amount: float) -> tuple[Change, ...]:
        """One group for each set of areas that some token lies in."""
        rows, columns = self._members(call, entry, "rows"), self._members(call, entry, "columns")
        (row_sets, row_group), (column_sets, column_group) = (
            torch.unique(side, dim=0, return_inverse=True) for side in (rows, columns)
        )
        values = torch.tensor([[scaled(value, amount) for value in row] for row in self.values], device=call.q.device)
        both = row_sets[:, None, :, None] & column_sets[None, :, None, :]
        best = torch.where(both, values, -math.inf).flatten(2).amax(-1)
        biases = torch.where(both.flatten(2).any(-1), best, 0.0)
        return by_table(self, call, entry, row_group, column_group, factor_of(biases))

    def _members(self, call: AttentionCall, entry: int, side: Side) -> Tensor:
        """bool [N or M, G]: the areas each token lies in."""
        members = torch.stack([inside(area, call, entry, side) for area in self.groups], -1)
        return members & inside(self.rows, call, entry)[:, None] if side == "rows" else members

    def __str__(self) -> str:
        return f"{self.name}({', '.join(map(str, self.groups))})"


@dataclass(eq=False)
class BiasFunction(Weighting):
    """L_ij <- L_ij + of(pos_i, pos_j) for video rows i in `rows` and video columns j in `columns`; text is left alone.

    `of(rows, columns)` is given whole numbers (frame, y, x) on the token grid, [n, 1, 3] and [1, m, 3], and gives
    biases that spread to [n, m]; -inf hides. A decay over frames is `lambda i, j: -0.5 * (i - j)[..., 0].abs()`. `axes`
    are the coordinates it reads, 0 frame, 1 y, 2 x; the others come as 0. Where these have few values (up to 64) the
    biases are a table of them, else a mask, some rows at a time. The strength multiplies finite biases. On CUDA a mask
    is rounded to the dtype of the model (bfloat16: to 0.4 % of each bias).

    Raises:
        UsageError: axes that are none of 0, 1, 2, or (when served) a bias that is not a number or above 80.
        PlanError: (when served) it would hide every key of a row.
    """

    of: Callable[[Tensor, Tensor], Tensor]
    columns: Area | None = None
    axes: Sequence[int] = field(default=(0, 1, 2), kw_only=True)
    kinds = JOINT | {"self"}

    def __post_init__(self) -> None:
        if not self.axes or set(self.axes) - {0, 1, 2}:
            raise UsageError(f"Axes must be some of 0 (frame), 1 (y) and 2 (x). Got {tuple(self.axes)}.")

    def areas(self) -> Iterable[Area | None]:
        """Rows and columns."""
        return self.rows, self.columns

    def changes(self, call: AttentionCall, entry: int, amount: float) -> tuple[Change, ...]:
        """One group for each place on the axes."""
        places, group = along(call.layout.grid, self.axes, call.q.device)

        def bias(i: Tensor, j: Tensor) -> Tensor:
            given = self.of(places[i], places[j])
            return torch.where(given.isneginf(), given, amount * given)

        return by_group(self, call, entry, group, bias, self.columns)

    def cost(self, layout: TokenLayout) -> float:
        """A mask, where places are many."""
        return cost_of(math.prod(layout.grid.shape[axis] for axis in set(self.axes)))

    def __str__(self) -> str:
        return f"BiasFunction({getattr(self.of, '__name__', 'of positions')})"


def along(grid: Grid, axes: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """The places (frame, y, x) on some axes, long [G, 3] with 0 on the others, and which of them each video token has,
    long [N_video].
    """
    shape = [size if axis in axes else 1 for axis, size in enumerate(grid.shape)]
    places = torch.cartesian_prod(*(torch.arange(size, device=device) for size in shape))
    numbers = torch.arange(len(places), device=device).view(shape)
    return places, numbers.expand(grid.shape).reshape(-1)


def scaled(bias: float, amount: float) -> float:
    """A bias at a strength; -inf stays."""
    return bias if math.isinf(bias) else amount * bias


def _refuse(edit: Weighting, value: float) -> None:
    if math.isnan(value) or value == math.inf:
        raise UsageError(
            f"A bias must be a number, or -inf to hide. Got {value:g} in {type(edit).__name__}. To see nothing else, "
            "hide the other columns."
        )
