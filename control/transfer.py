"""Transfer: some branches take q, k or v from another branch of the same call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from probe.call import AttentionCall
from probe.errors import PlanError, UsageError
from probe.plan import Handler, Stage
from probe.site import Branch, Where, Which

Source = int | Callable[[Branch], Branch | None]


@dataclass(eq=False)
class Transfer(Handler):
    """Rows of the batch read `tensors` of their source row instead of their own.

    `tensors` is any of "q", "k", "v", as in "kv": keys and values shared, the target keeps its own queries (DiTCtrl's
    KV sharing, MasaCtrl's mutual self-attention); "qk" carries over the whole attention map. `source` is a prompt
    index (the branch that equals the target but for its prompt), or a function from a target's branch to its source's
    branch, None to leave that row alone. `target` is a prompt index or None for every branch `where` selects. Exact,
    at the cost of plain attention; a row that is its own source stays bit-identical.

    Raises:
        UsageError: `tensors` names none or an unknown tensor.
        PlanError: (when served) the source is not in the same call.
    """

    tensors: str
    source: Source
    target: int | None = None
    where: Where = field(default_factory=Where)
    stage = Stage.EDIT
    rank = 2

    def __post_init__(self) -> None:
        if not self.tensors or set(self.tensors) - set("qkv"):
            raise UsageError(
                f"A Transfer must name tensors among q, k, v. Got {self.tensors!r}. Write for example 'kv'."
            )
        self.touches = frozenset(self.tensors)
        if self.target is not None:
            chosen = self.where.branches
            mine = Which(prompt=self.target)
            both = mine if chosen is None else (lambda branch: mine(branch) and chosen(branch))
            self.where = replace(self.where, branches=both)

    def __str__(self) -> str:
        source = f"prompt {self.source}" if isinstance(self.source, int) else getattr(self.source, "__name__", "source")
        target = "" if self.target is None else f" to prompt {self.target}"
        return f"Transfer({self.tensors} from {source}{target})"

    def serve(self, call: AttentionCall, rows: tuple[int, ...]) -> None:
        """Rebind the named tensors; q, k, v stay [B, H, N, D]."""
        index = list(range(len(call.branches)))
        for row in rows:
            index[row] = self._source_row(call, row)
            self._refuse_hidden(call, row, index[row])
        if index == list(range(len(index))):
            return
        call.rebind(**{name: self._take(getattr(call, name), call.own[name], index) for name in self.tensors})

    def _take(self, tensor: torch.Tensor, own: torch.Tensor, index: list[int]) -> torch.Tensor:
        """Sources give their own, unedited tensors: chained transfers do not depend on their order."""
        mixed = tensor.clone()
        heads = slice(None) if self.where.heads is None else list(self.where.head_list(tensor.shape[1]))
        for row, source in enumerate(index):
            if source != row:
                mixed[row, heads] = own[source, heads]
        return mixed

    def _refuse_hidden(self, call: AttentionCall, row: int, source: int) -> None:
        """A row keeps its own mask: where padding is hidden, keys of a longer or shorter text do not fit under it."""
        if call.visible is not None and call.visible[row] != call.visible[source] and self.touches & set("kv"):
            raise PlanError(
                f"Keys and values must come from a prompt of the same length where padding is hidden. Got "
                f"{call.visible[source]} visible keys for {call.visible[row]} at {call.site}. Make the prompts equally "
                "long, or transfer q alone."
            )

    def _source_row(self, call: AttentionCall, row: int) -> int:
        branch = call.branches[row]
        source = replace(branch, prompt=self.source) if isinstance(self.source, int) else self.source(branch)
        if source is None:
            return row
        if source not in call.branches:
            there = "; ".join(str(b) for b in call.branches)
            raise PlanError(
                f"The source of a Transfer must be in the same attention call. Got {source} at {call.site}, which "
                f"has: {there}. Generate source and target in one batch, on a family that attends to all of it at once "
                "(Mochi does not)."
            )
        return call.branches.index(source)
