"""The hub: one module through which all attention calls of a model pass, so that nnsight wraps nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from probe.call import AttentionCall
from probe.models.family import Slot
from probe.site import SPLIT, Site


class AttentionPoint(nn.Module):
    """One attention call as a module: `.inputs`, `.output` and `.skip` in a trace of one's own."""

    attend: Callable[[Tensor, Tensor, Tensor], Tensor]

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v and the result are [B, H, N, D]."""
        return self.attend(q, k, v)


class Hub(nn.Module):
    """Where all attention calls meet, in model order. A call of None ends a trace.

    `layers[i]` is the first attention of block i; `second` holds the others by name of their layer (SD3.5's image
    attention, Wan's cross attention).
    """

    def __init__(self, slots: list[Slot]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(AttentionPoint() for slot in slots if slot.call == 0)
        self.second = nn.ModuleDict({str(slot.layer): AttentionPoint() for slot in slots if slot.call})

    def point(self, at: Slot | Site) -> Any:
        """The module of a slot or of a call; Mochi's further calls are batch entries, not further modules."""
        return self.second[str(at.layer)] if at.kind in SPLIT and at.call else self.layers[at.layer]

    def forward(self, call: AttentionCall | None) -> Tensor | None:
        """Run the model's own attention on the tensors the call now holds."""
        return None if call is None else self.point(call.site)(call.q, call.k, call.v)
