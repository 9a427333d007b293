"""What edits of the attention weights share: changes made once for a prompt and layout, and the groups of a table."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
from torch import Tensor

from control.address import Area, Found, Side, inside
from control.edit import Edit
from probe.call import AttentionCall
from probe.change import Bias, Change, Factors
from probe.errors import LayoutError, PlanError, UsageError
from probe.layout import TokenLayout
from probe.region import Region
from probe.word import Prompt

Pairs = Callable[[Tensor, Tensor], Tensor]
"""Biases between groups of rows and groups of columns."""

MOST_GROUPS = 64
"""Groups of a table of factors at most: more would be as many small attentions. Beyond, they are a mask."""

MOST_LOOKED_UP = 4096
"""Groups up to which the mask is looked up in a table, 64 MiB at most; beyond, it is computed pair by pair."""

_CHUNK_BYTES = 2**26
"""Most memory that the rows take that are checked at once."""


@dataclass(eq=False, kw_only=True)
class Weighting(Edit):
    """An edit of the weights. What it asks for depends on layout, strength and words alone, so it is made once for all
    calls and entries, unless an area is found anew in each call. Edits of weights compose: their factors multiply.
    """

    touches = frozenset({"weights"})
    rank = 5
    composes = True
    _kept: dict[object, tuple[float, tuple[Change, ...]]] = field(default_factory=dict, init=False, repr=False)

    def changes(self, call: AttentionCall, entry: int, amount: float) -> tuple[Change, ...]:
        """What it asks for at an entry; nothing where that would change no weight.

        Raises:
            PlanError: a row would see no key.
        """
        raise NotImplementedError

    def areas(self) -> Iterable[Area | None]:
        """The areas it looks up."""
        return (self.rows,)

    def some_heads(self, call: AttentionCall) -> tuple[int, ...] | None:
        """The heads it changes, None for all."""
        heads = self.heads(call)
        return None if len(heads) == call.q.shape[1] else heads

    def end(self) -> None:
        """Forget what was made for the run."""
        self._kept.clear()

    def apply(self, call: AttentionCall, entry: int, amount: float) -> None:
        """Ask for the changes of an entry."""
        for change in self._changes(call, entry, amount):
            call.change(replace(change, entry=entry))

    def _changes(self, call: AttentionCall, entry: int, amount: float) -> tuple[Change, ...]:
        if any(isinstance(area, Found) for area in self.areas()):
            return self.changes(call, entry, amount)
        shown = self._prompt(call, entry) if any(_asks_words(area, call.layout) for area in self.areas()) else None
        key = (call.rows, call.columns, *call.sides(entry), shown, self.some_heads(call), call.q.device)
        if self._kept.get(key, (None,))[0] != amount:
            with torch.inference_mode(False):
                self._kept[key] = amount, self.changes(call, entry, amount)
        return self._kept[key][1]

    def _prompt(self, call: AttentionCall, entry: int) -> Prompt | bool:
        """The prompt an entry shows; else whether it should show one."""
        branch = call.branches[entry]
        known = branch.guided and branch.nearest < len(call.prompts)
        return call.prompts[branch.nearest] if known else branch.guided


def by_table(
    edit: Weighting,
    call: AttentionCall,
    entry: int,
    rows: Tensor,
    columns: Tensor,
    numerator: Tensor,
    denominator: Tensor | None = None,
) -> tuple[Change, ...]:
    """Factors [R, C] of row groups [N] and column groups [M]; nothing where all that occur are 1. Without a denominator
    the rows keep their unit sum.

    Raises:
        PlanError: a row would see no key.
    """
    denominator = numerator if denominator is None else denominator
    seen = call.sides(entry)
    there = torch.bincount(rows[: seen[0].total], minlength=numerator.shape[0]) > 0
    pairs = there[:, None] & (torch.bincount(columns[: seen[1].total], minlength=numerator.shape[1]) > 0)
    if not (pairs & ((numerator != 1) | (denominator != 1))).any():
        return ()
    if (there & ~(pairs & (denominator > 0)).any(1)).any():
        raise blind(edit, call)
    heads = edit.some_heads(call)
    made = Factors(entry=entry, heads=heads, rows=rows, columns=columns, numerator=numerator, denominator=denominator)
    return (made,)


def by_group(
    edit: Weighting,
    call: AttentionCall,
    entry: int,
    group: Tensor,
    of: Pairs,
    columns: Area | None = None,
) -> tuple[Change, ...]:
    """Biases among video tokens by a function of their groups: `of(i, j)` gives that of row groups i [n, 1] and column
    groups j [1, m]. `group` is long [N_video], counted from 0. Text, and what lies outside of `edit.rows` and
    `columns`, is left alone. A table of factors where the groups are few, else a mask.

    Raises:
        PlanError: a row would see no key.
    """
    count = int(group.max()) + 1
    rows, keys = _groups(call, entry, group, edit.rows, "rows"), _groups(call, entry, group, columns, "columns")
    if count > MOST_LOOKED_UP:
        return _by_pair(edit, call, entry, rows, keys, lambda i, j: _between(of, i, j, count))
    each = torch.arange(count + 1, device=group.device)
    table = _between(of, each, each, count)
    if count <= MOST_GROUPS:
        return by_table(edit, call, entry, rows, keys, factor_of(table))
    return _by_pair(edit, call, entry, rows, keys, lambda i, j: table.index_select(0, i).index_select(1, j))


def cost_of(groups: int) -> float:
    """Extra work of a bias by groups, as a share of the plain attention: none for a table, half for a mask."""
    return 0.5 if groups > MOST_GROUPS else 0.0


def factor_of(bias: Tensor) -> Tensor:
    """exp of biases, as single precision holds it.

    Raises:
        UsageError: not a number, or so large that it does not fit.
    """
    _refuse_large(bias)
    return bias.exp()


def blind(edit: Edit, call: AttentionCall) -> PlanError:
    """The refusal of an edit that hides every key."""
    return PlanError(
        f"Every row must see at least one key. Got {edit} at {call.site}, which hides all keys of some rows. Leave "
        "some columns, or choose fewer rows."
    )


@lru_cache(maxsize=512)
def _asks_words(area: Area | None, layout: TokenLayout) -> bool:
    """Whether an area depends on the prompt."""
    if not isinstance(area, Region):
        return False
    try:
        area.mask(layout)
    except LayoutError:
        return True
    return False


def _groups(call: AttentionCall, entry: int, group: Tensor, area: Area | None, side: Side) -> Tensor:
    """The group of each token of the call, [N] or [M]; one more for those that are left alone."""
    layout, count = getattr(call, side), int(group.max()) + 1
    groups = torch.full((layout.total,), count, device=group.device)
    if layout.video:
        groups[layout.video_slice] = group
    return groups if area is None else groups.masked_fill(~inside(area, call, entry, side), count)


def _between(of: Pairs, i: Tensor, j: Tensor, count: int) -> Tensor:
    """Biases [n, m] between groups i [n] and j [m]; 0 for the group `count`, that of the tokens left alone."""
    i, j = i[:, None], j[None]
    biases = of(i.clamp_max(count - 1), j.clamp_max(count - 1))
    return torch.where((i < count) & (j < count), biases, 0.0).float()


def _by_pair(
    edit: Weighting, call: AttentionCall, entry: int, rows: Tensor, keys: Tensor, between: Pairs
) -> tuple[Change, ...]:
    """A bias that is made of the groups of some rows when they are attended."""

    def bias(part: slice) -> Tensor:
        return between(rows[part], keys)

    lines, width = (side.total for side in call.sides(entry))
    changes = False
    step = max(1, _CHUNK_BYTES // (8 * max(width, 1)))
    for at in range(0, lines, step):
        some = bias(slice(at, min(at + step, lines)))[:, :width]
        _refuse_large(some)
        if some.isneginf().all(1).any():
            raise blind(edit, call)
        changes = changes or bool(some.any())
    return (Bias(entry=entry, heads=edit.some_heads(call), of=bias),) if changes else ()


def _refuse_large(bias: Tensor) -> None:
    if not (bias <= 80).all():
        raise UsageError(
            f"A bias must be at most 80, a factor of 5e34. Got {bias.max().item():g}. Hide the other columns instead."
        )
