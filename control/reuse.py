"""Reuse: windowed attention corrected by what full attention gave a few steps ago."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from control.edit import Edit
from control.shadow import shadow
from probe import attend, weigh
from probe.attend import State
from probe.call import AttentionCall
from probe.entry import index_of
from probe.errors import UsageError
from probe.layout import TokenLayout
from probe.plan import Stage
from probe.site import Branch, Where
from probe.word import Prompt


class _Cached(NamedTuple):
    """The step it is from, the mass kept by the window [h, N], and the rest of the output [h, N, D]."""

    step: int
    kept: Tensor
    rest: Tensor


@dataclass(eq=False)
class Reuse(Edit):
    """O = rho O_window + R, with the kept mass rho and the rest R = O - rho O_window of the last full step: Re-ttention
    (arXiv 2505.22918).

    `window` is an edit of the weights, a Window for example. Before step `warm` attention is full; from then on it is
    full at every `period`-th step, which caches rho, the share of each row's probability that the window keeps, and R.
    In between it is windowed, and rho grows by `drift` a step from the second on, to 1 at most (the authors' is not
    bounded). The defaults are theirs for CogVideoX-2B and 50 steps. Full steps keep their bits; with unchanged q, k, v
    and no drift a windowed step equals the full one.

    `where` is that of the window unless given; rows and strength are the window's. It comes after all other edits of
    the weights, whose attention it windows and corrects; at calls that have any, full or windowed, it saves no work.
    Several must have heads or branches of their own. Memory: one output and one number per row for each layer, branch
    and selected head, see `bytes`. Readouts of weights at windowed steps see the full map.

    Raises:
        UsageError: rows or strength of its own, a period below 1, a warm-up below 0, or a window that is no edit of the
            weights.
    """

    window: Edit
    period: int = field(default=5, kw_only=True)
    warm: int = field(default=15, kw_only=True)
    drift: float = field(default=0.04, kw_only=True)
    touches = frozenset({"out"})
    rank = 7

    def __post_init__(self) -> None:
        if self.rows is not None or self.strength != 1.0:
            raise UsageError("A Reuse must be whole. Got rows or a strength. Give these to its window.")
        if self.period < 1 or self.warm < 0:
            raise UsageError(
                f"A Reuse must have a period of 1 or more and a warm-up of 0 or more steps. Got {self.period} and "
                f"{self.warm}."
            )
        if self.window.stage != Stage.EDIT or not self.window.composes:
            raise UsageError(f"The window of a Reuse must be an edit of the weights. Got {self.window}.")
        self.window = copy(self.window)
        self.where = self.window.where = self.window.where if self.where == Where() else self.where
        self.kinds = self.window.kinds
        self._cached: dict[tuple[int, str, Branch], _Cached] = {}

    def __str__(self) -> str:
        return f"Reuse({self.window}, full every {self.period} steps from step {self.warm})"

    def begin(self, prompts: Sequence[Prompt], steps: int, layers: int) -> None:
        """Forget the last run."""
        super().begin(prompts, steps, layers)
        self.window.begin(prompts, steps, layers)
        self._cached = {}

    def end(self) -> None:
        """Let go of the cache."""
        self.window.end()
        self._cached = {}

    def cost(self, layout: TokenLayout) -> float:
        """One more attention, the windowed one, at full steps; elsewhere it takes the place of the full one."""
        return 1 / self.period + self.window.cost(layout)

    @property
    def bytes(self) -> int:
        """Memory of the cache."""
        return sum(x.numel() * x.element_size() for one in self._cached.values() for x in (one.kept, one.rest))

    def serve(self, call: AttentionCall, rows: tuple[int, ...]) -> None:
        """Cache at full steps, and compute the windowed output in between."""
        if call.site.step < self.warm:
            return
        with torch.no_grad():
            windowed = shadow(call)
            self.window.serve(windowed, rows)
            if (call.site.step - self.warm) % self.period and all(self._known(call, row) for row in rows):
                self._reuse(call, rows, self._attended(windowed))
            else:
                self._cache(call, rows, self._attended(windowed))

    def treats(self, branch: Branch) -> Hashable:
        """Whether it is selected, and what its window does."""
        return super().treats(branch), self.window.treats(branch)

    def _known(self, call: AttentionCall, row: int) -> bool:
        """Whether the last full step kept something of an entry; not one of a role that it had before that."""
        kept = self._cached.get(self._place(call, row))
        return kept is not None and call.site.step - kept.step < self.period

    def _place(self, call: AttentionCall, row: int) -> tuple[int, str, Branch]:
        return call.site.layer, call.site.kind, call.branches[row]

    def _cache(self, call: AttentionCall, rows: tuple[int, ...], window: State) -> None:
        heads = index_of(self.heads(call), call.q.device)
        if call.out is None and not call.changes:
            call.run_with_lse()
        whole = self._attended(shadow(call)) if call.out is None or call.changes else State(call.out, call.lse())
        for row in rows:
            kept = torch.exp(window.lse[row, heads] - whole.lse[row, heads])
            rest = whole.out[row, heads].to(kept.dtype) - kept.unsqueeze(-1) * window.out[row, heads]
            self._cached[self._place(call, row)] = _Cached(call.site.step, kept, rest.to(call.q.dtype))

    def _reuse(self, call: AttentionCall, rows: tuple[int, ...], window: State) -> None:
        """The output of the whole call; that of other entries and heads is the one they have without, or of another
        Reuse. Changes stay, for readouts.
        """
        out = (window.out if call.out is None else call.out).clone()
        heads = index_of(self.heads(call), call.q.device)
        for row in rows:
            step, kept, rest = self._cached[self._place(call, row)]
            share = (kept + self.drift * (call.site.step - step - 1)).clamp_max(1).unsqueeze(-1)
            out[row, heads] = (share * window.out[row, heads] + rest).to(out.dtype)
        call.out, call.native = out, False  # weights that are changed no longer make the output

    def _attended(self, call: AttentionCall) -> State:
        """Output [B, H, N, D] and normaliser [B, H, N] of a copy with its changes."""
        if call.changes:
            weigh.run(call, (self, "other edits"))
        else:
            call.run_with_lse()
        if call.out is None:
            call.out = call.over(attend.partial(call.q, call.k, call.v, call.scale, call.bias).out)
        return State(call.out, call.lse())
