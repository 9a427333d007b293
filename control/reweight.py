"""Reweight: the probability of some columns is multiplied by a factor."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch

from control.address import Area, inside
from control.weighting import Weighting, by_table
from probe.call import AttentionCall
from probe.change import Change, Move
from probe.errors import UsageError
from probe.region import video

Mode = Literal["raw", "renormalised", "redistributed"]


@dataclass(eq=False)
class Reweight(Weighting):
    """P_ij <- c P_ij for the columns j in `columns` and the rows i in `rows`, the video rows unless told otherwise.
    c goes from 1 to `factor` as the strength goes from 0 to 1.

    - "raw": the rest stays, and the rows lose their unit sum. c may be negative. Prompt-to-prompt's reweighting (arXiv
      2208.01626) and DiTCtrl's; there on cross attention, here on the columns of the joint softmax.
    - "renormalised": the rows are divided by their new sum, which is `Bias(log c)`; 0 hides.
    - "redistributed": what the columns lose, 1 - c of their mass, goes to the columns `to` in proportion to theirs, by
      default the other video columns; all others keep theirs. c in 0 to 1. VAR (visual attention redistribution,
      language models): the columns are `Sinks`, c = 0.6. It picks heads by their mass on the image, which here is up to
      `where`. Rows that have no mass on `to` keep their own.

    Words are looked up in the prompt of each conditional branch; the unconditional half shows none and is left alone.

    Raises:
        UsageError: an unknown mode, a factor that does not fit it, or `to` in another mode.
        PlanError: (when served) it would hide every key of a row.
        WordError: (when served) a conditional prompt it addresses lacks a word; lists the words of the prompt.
    """

    columns: Area
    factor: float
    mode: Mode = "raw"
    to: Area | None = field(default=None, kw_only=True)
    rows: Area | None = field(default_factory=video, kw_only=True)

    def __post_init__(self) -> None:
        if self.mode not in ("raw", "renormalised", "redistributed"):
            raise UsageError(f"A mode must be raw, renormalised or redistributed. Got {self.mode!r}. Choose one.")
        if self.to is not None and self.mode != "redistributed":
            raise UsageError(f"Only redistributed mass goes to other columns. Got `to` with {self.mode}. Leave it out.")
        self._refuse(self.factor)

    def areas(self) -> Iterable[Area | None]:
        """Rows and columns."""
        return self.rows, self.columns, self.to

    def changes(self, call: AttentionCall, entry: int, amount: float) -> tuple[Change, ...]:
        """Two groups of rows and columns, or a move."""
        factor = 1 + amount * (self.factor - 1)
        self._refuse(factor)
        rows, columns = inside(self.rows, call, entry), inside(self.columns, call, entry, "columns")
        if self.mode == "redistributed":
            return self._move(call, entry, factor, rows, columns)
        table = torch.ones(2, 2, device=call.q.device)
        table[1, 1] = factor
        denominator = torch.ones_like(table) if self.mode == "raw" else None
        return by_table(self, call, entry, rows.long(), columns.long(), table, denominator)

    def _move(
        self, call: AttentionCall, entry: int, factor: float, rows: torch.Tensor, columns: torch.Tensor
    ) -> tuple[Change, ...]:
        target = inside(video() if self.to is None else self.to, call, entry, "columns") & ~columns
        if factor == 1 or not (rows.any() and columns.any() and target.any()):
            return ()
        heads = self.some_heads(call)
        return (Move(entry=entry, heads=heads, source=columns, target=target, keep=factor, rows=rows),)

    def _refuse(self, factor: float) -> None:
        """Refuse a factor that does not fit the mode."""
        least, most = {"raw": (-float("inf"), float("inf")), "renormalised": (0, 5e34)}.get(self.mode, (0, 1))
        if not (least <= factor <= most and abs(factor) < float("inf")):
            said = {"raw": "be a number", "renormalised": "be 0 or more"}.get(self.mode, "lie in 0 to 1")
            raise UsageError(
                f"A {self.mode} factor must {said}. Got {factor:g}. Negative and larger ones are for the mode raw."
            )

    def __str__(self) -> str:
        return f"Reweight({self.columns} x {self.factor:g}, {self.mode})"
