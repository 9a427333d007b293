"""Factors of attention weights as one table over groups of rows and groups of columns, kept on the CPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from probe.change import Factors
from probe.entry import Place

HIDDEN = -(2.0**15)
"""What an extra channel of q or k holds for a factor of 0: finite in half precision too, and exp of it is 0."""

LARGEST = math.exp(80)
"""The largest factor: sums of such weights still fit into single precision."""


@dataclass(frozen=True, eq=False)
class Table:
    """Row i and column j have the factors numerator[g, c] and denominator[g, c], g = rows[i] and c = columns[j].

    `rows` long [N], `columns` long [M], the tables float64 [R, C]. Every group has a member, and no two groups of rows
    or of columns have the same factors. What goes to a device is copied once, for each copy makes it wait.
    """

    rows: Tensor
    columns: Tensor
    numerator: Tensor
    denominator: Tensor
    _copies: dict[object, Place] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def row_sizes(self) -> Tensor:
        """Rows in each group [R]."""
        return torch.bincount(self.rows, minlength=len(self.numerator))

    @cached_property
    def column_sizes(self) -> Tensor:
        """Columns in each group [C]."""
        return torch.bincount(self.columns, minlength=self.numerator.shape[1])

    @cached_property
    def changed(self) -> Tensor:
        """Where a factor is not 1, bool [R, C]."""
        return (self.numerator != 1) | (self.denominator != 1)

    @cached_property
    def hidden(self) -> Tensor:
        """Where nothing is left to compute, bool [R, C]."""
        return (self.numerator == 0) & (self.denominator == 0)

    @cached_property
    def plain(self) -> bool:
        """Whether all factors are 1."""
        return not self.changed.any()

    @cached_property
    def raw(self) -> bool:
        """Whether rows do not sum to one."""
        return not torch.equal(self.numerator, self.denominator)

    @cached_property
    def positive(self) -> bool:
        """Whether the factors have logarithms, that of 0 being -inf."""
        return bool((self.numerator >= 0).all() and (self.denominator >= 0).all())

    @cached_property
    def largest(self) -> float:
        """The largest factor in size."""
        return max(self.numerator.abs().max().item(), self.denominator.abs().max().item())

    @cached_property
    def blind(self) -> Tensor:
        """Groups of rows that see nothing, bool [R]."""
        return (self.denominator == 0).all(1)

    def among(self, columns: Tensor) -> Table:
        """The same for some of the columns, bool [M]."""
        return _distinct(Table(self.rows, self.columns[columns], self.numerator, self.denominator))

    def row_places(self, groups: Tensor, device: torch.device) -> Place:
        """The rows of some groups, bool [R]."""
        return self._copied(("row", *groups.tolist(), device), lambda: place_of(groups[self.rows], device))

    def column_places(self, groups: Tensor, device: torch.device) -> Place:
        """The columns of some groups, bool [C]."""
        return self._copied(("column", *groups.tolist(), device), lambda: place_of(groups[self.columns], device))

    def by_row(self, values: Tensor, like: Tensor, rows: Place = slice(None)) -> Tensor:
        """Values [R, ...] of the groups of some rows [n, ...], in the dtype and on the device of `like`."""
        return values.to(like)[self._copied(("rows", like.device), lambda: self.rows.to(like.device))[rows]]

    def by_column(self, values: Tensor, like: Tensor) -> Tensor:
        """Values [C, ...] of the group of each column [M, ...], in the dtype and on the device of `like`."""
        return values.to(like)[self._copied(("columns", like.device), lambda: self.columns.to(like.device))]

    def channels(self, logs: Tensor, like: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Extra channels u [N, r] of q and w [M, r] of k in the dtype of `like`, with scale u_i w_j = logs[g, c].

        One channel for each group of the side that has fewer; twice as many in half precision, where a number is kept
        as the sum of two.
        """
        values = (logs / scale).clamp_min(HIDDEN)
        rows_fewer = values.shape[0] <= values.shape[1]
        told = values.mT if rows_fewer else values
        high = told.to(like.dtype)
        parts = [high] if high.element_size() > 2 else [high, (told - high.double()).to(like.dtype)]
        marks = torch.eye(min(values.shape)).repeat(1, len(parts))
        if rows_fewer:
            return self.by_row(marks, like), self.by_column(torch.cat(parts, 1), like)
        return self.by_row(torch.cat(parts, 1), like), self.by_column(marks, like)

    def _copied(self, key: object, make: Callable[[], Place]) -> Any:
        if key not in self._copies:
            self._copies[key] = make()
        return self._copies[key]


def table_of(factors: Sequence[Factors], rows: int, keys: int) -> Table:
    """The product of factors over N rows and the first `keys` columns. Made once for the same tensors."""
    return _table_of(tuple((one.rows, one.columns, one.numerator, one.denominator) for one in factors), rows, keys)


def place_of(mask: Tensor, device: torch.device) -> Place:
    """Where a mask on the CPU is true: a slice where one place follows the other, else positions on the device."""
    places = mask.nonzero().squeeze(1)
    start = int(places[0]) if len(places) else 0
    if not len(places) or int(places[-1]) - start + 1 == len(places):
        return slice(start, start + len(places))
    return places.to(device)


def widened(tensor: Tensor, channels: Sequence[Tensor], extra: int) -> Tensor:
    """A tensor [..., N, D] with `extra` channels behind it: those given [..., N, r], then zeros."""
    wide = torch.cat([tensor, *(one.expand(*tensor.shape[:-1], -1) for one in channels)], -1)
    return F.pad(wide, (0, tensor.shape[-1] + extra - wide.shape[-1]))


@lru_cache(maxsize=32)
def _table_of(factors: tuple[tuple[Tensor | None, Tensor, Tensor, Tensor], ...], rows: int, keys: int) -> Table:
    ones = torch.ones(1, 1, dtype=torch.float64)
    table = Table(torch.zeros(rows, dtype=torch.long), torch.zeros(keys, dtype=torch.long), ones, ones)
    for own, *rest in factors:
        columns, numerator, denominator = (x.detach().cpu() for x in rest)
        table = _times(table, table.rows * 0 if own is None else own.cpu(), columns, numerator, denominator)
    return _distinct(table)


def _times(table: Table, rows: Tensor, columns: Tensor, numerator: Tensor, denominator: Tensor) -> Table:
    across, along = numerator.shape
    pairs, row_of = _used(table.rows * across + rows[: len(table.rows)])
    others, column_of = _used(table.columns * along + columns[: len(table.columns)])
    old, new = (pairs[:, None] // across, others // along), (pairs[:, None] % across, others % along)
    tables = (table.numerator[old] * numerator.double()[new], table.denominator[old] * denominator.double()[new])
    return Table(row_of, column_of, *tables)


def _used(labels: Tensor) -> tuple[Tensor, Tensor]:
    """The labels there are, ascending, and the place of each label among them."""
    count = torch.bincount(labels) if len(labels) else labels
    used = count.nonzero().squeeze(1)
    return used, (count.bool().cumsum(0) - 1)[labels]


def _distinct(table: Table) -> Table:
    """The same with equal groups joined and empty ones left out."""
    rows, row_of = _used(table.rows)
    columns, column_of = _used(table.columns)
    both = torch.stack([table.numerator, table.denominator])[:, rows[:, None], columns]
    both, joined = torch.unique(both, dim=1, return_inverse=True)
    row_of = joined[row_of]
    both, joined = torch.unique(both, dim=2, return_inverse=True)
    return Table(row_of, joined[column_of], both[0].contiguous(), both[1].contiguous())
