"""Transfer: some branches take q, k, v or the output from another branch, another step, or rows of their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from control.address import Gate
from control.bank import NAMES, Given, refuse_names
from control.match import Match
from control.place import Numbers, Partners, partners_of, placed, refuse_misfit, weight_of
from control.source import Ask, Itself, OfBranch, Peer, Source
from control.taking import Taking
from probe.call import AttentionCall
from probe.entry import index_of
from probe.errors import UsageError
from probe.layout import TokenLayout
from probe.plan import Stage
from probe.region import Region
from probe.site import JOINT

Mapping = Match | Numbers | Callable[[Tensor], Tensor]


@dataclass(eq=False)
class Transfer(Taking):
    """X[r] <- (1 - g_r) X[r] + g_r X_source[pi(r)] for each X of `tensors`, at the rows r and the heads selected.

    `tensors`: any of q, k, v, as in "kv": keys and values shared, the target keeps its own queries (DiTCtrl's KV
    sharing, MasaCtrl's mutual self-attention); or "o", the output before merges. `source` is a prompt index (the branch
    that equals the target but for its prompt), a function from a target's branch to its source's branch (None leaves
    the target alone), or a Source: Peer, Itself, Constant, Stored. `target` is a prompt index, or None for every branch
    `where` selects. g is the strength times the `gate`. `mapping` is pi, from video tokens of the target to those of
    the source (text stays at its place): a Match, one number per token (-1: none), or a function of the numbers.

    Sources give unedited tensors: chained transfers do not depend on their order, and the source keeps its bits. A
    target that is its own source keeps its bits. Exact, at the cost of plain attention.

    - "qk" of all rows carries over the whole attention map: O = P_source V_target (arXiv 2504.10317).
    - "qk" of `rows=video()` (ConsistEdit, arXiv 2510.17803) makes the map conditional on the video equal the source's,
      but not the mass between video and text, as text queries and keys stay the target's.
    - q and k are taken after QK-norm. It is per token and head, so that a whole transfer before it is the same; a soft
      one is not.
    - q and k are taken after RoPE. What a mapping moves keeps the position it had (`positions` "source"), or is turned
      to the one where it lands ("target").

    Where entries differ in text length (Mochi, hidden padding) video goes to video, and text rows are refused.

    Raises:
        UsageError: `tensors` names none, an unknown one, or o with others.
        PlanError: (when served) the source is not there, or does not fit.
    """

    tensors: str
    source: int | OfBranch | Source
    target: int | None = None
    gate: Gate | None = field(default=None, kw_only=True)
    mapping: Mapping | None = field(default=None, kw_only=True)
    positions: Literal["source", "target"] = field(default="source", kw_only=True)
    rank = 2

    def __post_init__(self) -> None:
        refuse_names("Transfer", self.tensors)
        if "o" in self.tensors:
            if self.tensors != "o":
                raise UsageError(f"A Transfer of o must be one of its own. Got {self.tensors!r}. Write two of them.")
            self.stage, self.rank = Stage.MERGE, 3
        self.touches = frozenset(NAMES[name] for name in self.tensors)
        self._moves = _moves(self.mapping)
        if not isinstance(self.mapping, Match):
            self.takes(self.tensors)
            return
        features = self.mapping.features
        if features in "kv":
            self.kinds = JOINT | {"self"}  # the keys of cross attention are no video
        compared = features if self.mapping.source is None else ""
        needed = "".join(dict.fromkeys(self.tensors + compared))
        self.takes(needed, *((source, features) for source in self.mapping.sources))

    def __str__(self) -> str:
        target = "" if self.target is None else f" to prompt {self.target}"
        more = [str(one) for one in (self.rows, self.mapping) if isinstance(one, Region | Match)]
        return f"Transfer({', '.join([f'{self.tensors} from {self._from}{target}', *more])})"

    def cost(self, layout: TokenLayout) -> float:
        """None but for a Match, which compares all video tokens: half of an attention among them."""
        return 0.5 * (layout.grid.size / layout.total) ** 2 if isinstance(self.mapping, Match) else 0.0

    def apply(self, call: AttentionCall, entry: int, amount: float) -> None:
        """Write the source's rows into the tensors of one entry."""
        heads = self.heads(call)
        given = self._from.given(call, entry, Ask(self._needs[0][1], heads, self.rows))
        if given is None or (self.mapping is None and self._is_itself(given, call, entry)):
            return
        partners = self._partners(given, call, entry, heads)
        for name in self.tensors:
            weight = weight_of(self.rows, self.gate, partners, call, entry, name)
            refuse_misfit(name, given, partners, weight, call, entry)
            theirs = placed(name, given, partners, call, heads, self.positions == "target")
            tensor, index = call.writable(NAMES[name]), index_of(heads, call.q.device)
            if weight is not None:
                theirs = torch.lerp(tensor[entry, index], theirs, (amount * weight).unsqueeze(-1))
            elif amount != 1:
                theirs = torch.lerp(tensor[entry, index], theirs, amount)
            tensor[entry, index] = theirs

    def _is_itself(self, given: Given, call: AttentionCall, entry: int) -> bool:
        here = given.site == call.site and given.branch == call.branches[entry]
        return here and isinstance(self._from, Peer | Itself)

    def _partners(self, given: Given, call: AttentionCall, entry: int, heads: tuple[int, ...]) -> Partners | None:
        """The mapping at an entry; None if each row takes the one at its place."""
        if isinstance(self._moves, Match):
            return self._moves.partners(given, call, entry, heads)
        return None if self._moves is None else partners_of(self._moves, call, given.rows.grid)


def _moves(mapping: Mapping | None) -> Match | Tensor | Callable[[Tensor], Tensor] | None:
    """A mapping, numbers as a tensor."""
    if mapping is None or isinstance(mapping, Match | Tensor) or callable(mapping):
        return mapping
    return torch.as_tensor(mapping)
