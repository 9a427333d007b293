"""Curved paths from a map to the identity, for perturbed passes (HeadHunter); the straight one is SoftPAG, a Fork."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from control.address import inside
from control.edit import Edit
from probe.call import AttentionCall
from probe.change import Map
from probe.errors import UsageError
from probe.layout import TokenLayout
from probe.site import JOINT

Path = Literal["slerp", "chord", "log"]


@dataclass(eq=False)
class PathToIdentity(Edit):
    """The map moves towards the identity by the strength u along another line than the straight one of SoftPAG.

    "slerp": the Fisher-Rao geodesic, row = (sin(u t) / sin(t) e_i + sin((1 - u) t) / sin(t) sqrt(P_i))^2 with t =
    arccos(sqrt(P_ii)). "chord": (u e_i + (1 - u) sqrt(P_i))^2, renormalised (named fisher_rao in HeadHunter's code).
    "log": p^u P_i^(1 - u), renormalised, with p = e_i + 1e-6. All columns take part, text rows too unless `rows` says
    otherwise. Needs explicit weights. Rows must keep unit sum: reweighting without renormalising at the same place
    makes no path.

    Raises:
        UsageError: an unknown path.
    """

    path: Path = "slerp"
    rank = 6
    touches = frozenset({"weights"})
    kinds: frozenset[str] | None = field(default=JOINT | {"self"}, init=False)

    def __post_init__(self) -> None:
        if self.path not in get_args(Path):
            raise UsageError(f"A path must be slerp, chord or log. Got {self.path!r}. Choose one of them.")

    def __str__(self) -> str:
        return f"PathToIdentity({self.path})"

    def cost(self, layout: TokenLayout) -> float:
        """Explicit rows: about one more attention."""
        return 1.0

    def apply(self, call: AttentionCall, entry: int, amount: float) -> None:
        """Tell the call its map."""
        within = inside(self.rows, call, entry)

        def of(weights: Tensor, rows: slice) -> Tensor:
            own = _own_columns(weights, rows)
            return torch.where(within[rows].unsqueeze(-1), _ON_PATH[self.path](weights, own, amount), weights)

        heads = None if self.where.heads is None else self.heads(call)
        call.change(Map(entry=entry, heads=heads, of=of))


def _own_columns(weights: Tensor, rows: slice) -> Tensor:
    """bool [n, M]: the column of each row's own token."""
    columns = torch.arange(weights.shape[-1], device=weights.device)
    return columns == torch.arange(rows.start, rows.start + weights.shape[-2], device=weights.device).unsqueeze(-1)


def _slerp(weights: Tensor, own: Tensor, u: float) -> Tensor:
    angle = torch.where(own, weights, 0.0).sum(-1, keepdim=True).sqrt().clamp(max=1.0).arccos()
    there, here = (torch.sin(share * angle) / angle.sin() for share in (u, 1 - u))
    moved = (torch.where(own, there, 0.0) + here * weights.sqrt()) ** 2
    return torch.where(angle > 0, moved, weights)


def _chord(weights: Tensor, own: Tensor, u: float) -> Tensor:
    moved = (u * own.to(weights) + (1 - u) * weights.sqrt()) ** 2
    return moved / moved.sum(-1, keepdim=True)


def _log_linear(weights: Tensor, own: Tensor, u: float) -> Tensor:
    moved = (own.to(weights) + 1e-6) ** u * weights ** (1 - u)
    return moved / moved.sum(-1, keepdim=True)


_ON_PATH = {"slerp": _slerp, "chord": _chord, "log": _log_linear}
