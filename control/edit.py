"""What every edit is: a handler with a place, a strength over the steps, and the rows it changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from control.address import Area, inside
from control.strength import Strength, strength_at
from probe.call import AttentionCall
from probe.plan import Handler, Stage
from probe.site import Where
from probe.word import Prompt


@dataclass(eq=False, kw_only=True)
class Edit(Handler):
    """A handler that changes a call. `rows` are the tokens it changes (all for None), `strength` how much, a number or
    a function of progress; 0 leaves every bit as it was. `where` says which calls, heads and branches.
    """

    rows: Area | None = None
    strength: Strength = 1.0
    where: Where = field(default_factory=Where)
    stage: Stage = Stage.EDIT

    def begin(self, prompts: Sequence[Prompt], steps: int, layers: int) -> None:
        """Learn how many steps the run has."""
        self.steps, self.layers = steps, layers

    def amount(self, call: AttentionCall) -> float:
        """The strength at a call."""
        return strength_at(self.strength, call.site.step, self.steps)

    def heads(self, call: AttentionCall) -> tuple[int, ...]:
        """The heads it changes, ascending."""
        return self.where.head_list(call.q.shape[1])

    def extent(self, call: AttentionCall, row: int) -> Tensor | None:
        """bool [N]: the rows it changes."""
        return None if self.rows is None else inside(self.rows, call, row)

    def serve(self, call: AttentionCall, rows: tuple[int, ...]) -> None:
        """Apply the edit to each batch entry, unless its strength is 0."""
        amount = self.amount(call)
        if amount:
            with torch.no_grad():
                for row in rows:
                    self.apply(call, row, amount)

    def apply(self, call: AttentionCall, entry: int, amount: float) -> None:
        """Change one batch entry of a call."""
        raise NotImplementedError
