"""The direction from one prompt to another, in the outputs of one call."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from control.address import Area, inside
from control.bank import own_of
from control.shift import Shift
from probe.attend import exact_dtype
from probe.call import AttentionCall
from probe.errors import PlanError
from probe.region import video


@dataclass(eq=False)
class Between(Shift):
    """O <- O + strength (mean of O of the prompt `to` - mean of O of the prompt `away`), both over the selected rows of
    their unperturbed branches of the same half, per head (In-Context Brush, arXiv 2505.20271, steers from the query to
    the demonstration). Where one of them has no such row nothing moves.

    Raises:
        PlanError: (when served) one of them is not in the same call.
    """

    tensor: Literal["o"] = field(default="o", init=False)
    direction: torch.Tensor = field(default_factory=lambda: torch.zeros(1), init=False)
    away: int = field(kw_only=True)
    to: int = field(kw_only=True)
    rows: Area | None = field(default_factory=video, kw_only=True)

    def __str__(self) -> str:
        return f"Shift(o from prompt {self.away} to prompt {self.to})"

    def apply(self, call: AttentionCall, entry: int, amount: float) -> None:
        """Move the rows of one batch entry."""
        away, to = (self._rows(call, entry, prompt) for prompt in (self.away, self.to))
        if away.shape[1] and to.shape[1]:
            self.direction = to.mean(1, keepdim=True) - away.mean(1, keepdim=True)
            super().apply(call, entry, amount)

    def _rows(self, call: AttentionCall, entry: int, prompt: int) -> torch.Tensor:
        """[h, n, D] of the unedited output."""
        branch = replace(call.branches[entry], prompt=prompt, role="plain")
        other = call.row_of(branch)
        if other is None:
            raise PlanError(
                f"A direction must be between prompts of one attention call. Got {branch} at {call.site}, which has: "
                f"{'; '.join(map(str, call.branches))}. Use a family that attends to all prompts at once."
            )
        heads = self.heads(call)
        out = own_of(call, other, "o", heads).take("o", heads)
        rows = inside(self.rows, call, other)
        return out[:, rows].to(exact_dtype(out.dtype))
