"""What edits share that take tensors from a source: which branches are targets, which may give, and when."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from control.address import Side, inside
from control.edit import Edit
from control.source import Ask, OfBranch, Peer, Source, source_of
from probe.call import AttentionCall
from probe.errors import PlanError
from probe.site import Branch, Which
from probe.word import Prompt


class Taking(Edit):
    """An edit with a `source` and a `target`: a prompt index, or None for every branch `where` selects. Calls that hold
    sources alone are served too, where a source keeps what targets in later calls of the step take.
    """

    source: int | OfBranch | Source
    target: int | None

    def takes(self, names: str, *others: tuple[Source, str]) -> None:
        """Once, when made: the tensors taken of the source, and of other sources beside it."""
        self._from, self._prompts = source_of(self.source), 0
        self.side: Side = "columns" if self.touches <= {"k", "v"} else "rows"
        self._needs = ((self._from, names), *others)
        self._aims = _both(self.where.branches, None if self.target is None else Which(prompt=self.target))
        early = any(source.early for source, _ in self._needs)
        self.where = replace(self.where, branches=self._concerns if early and self._aims else self._aims)

    def begin(self, prompts: Sequence[Prompt], steps: int, layers: int) -> None:
        """Forget the last run.

        Raises:
            PlanError: the source or the target is no prompt of the run.
        """
        super().begin(prompts, steps, layers)
        self._prompts = len(prompts)
        named = (self.target, self._from.of if isinstance(self._from, Peer) else None)
        if prompts and not all(0 <= one < len(prompts) for one in named if isinstance(one, int)):
            raise PlanError(
                f"Source and target must name prompts of the run, 0 to {len(prompts) - 1}. Got {self}. Pass the "
                "prompts of both in one call."
            )
        for source, _ in self._needs:
            source.begin()

    def end(self) -> None:
        """Let go of what sources kept for the next call."""
        for source, _ in self._needs:
            source.end()

    def extent(self, call: AttentionCall, row: int) -> Tensor | None:
        """bool, one per query (of k and v alone: per key): what it changes; nothing of a mere source."""
        changed = inside(self.rows, call, row, self.side)
        return changed if self._is_target(call.branches[row]) else torch.zeros_like(changed)

    def serve(self, call: AttentionCall, rows: tuple[int, ...]) -> None:
        """Let sources keep what targets of later calls take, and change the targets of this one."""
        targets = tuple(row for row in rows if self._is_target(call.branches[row]))
        for source, names in self._needs if self.amount(call) else ():
            givers = tuple(row for row, branch in enumerate(call.branches) if self._may_give(source, branch))
            source.watch(call, Ask(names, self.heads(call)), givers, targets)
        super().serve(call, targets)

    def treats(self, branch: Branch) -> Hashable:
        """Whether it is a target, and of what sources."""
        return self._is_target(branch) and tuple(source.treats(branch) for source, _ in self._needs)

    def met(self, call: AttentionCall, rows: tuple[int, ...]) -> bool:
        """Whether there is a target among the entries, not only sources of later ones."""
        return any(self._is_target(call.branches[row]) for row in rows)

    def _is_target(self, branch: Branch) -> bool:
        return self._aims is None or self._aims(branch)

    def _may_give(self, source: Source, branch: Branch) -> bool:
        return source.may_give(branch, self._is_target, self._prompts)

    def _concerns(self, branch: Branch) -> bool:
        """Targets, and sources that may come in earlier calls."""
        return self._is_target(branch) or any(self._may_give(source, branch) for source, _ in self._needs)


def _both(
    one: Callable[[Branch], bool] | None, other: Callable[[Branch], bool] | None
) -> Callable[[Branch], bool] | None:
    if one is None or other is None:
        return one or other
    return lambda branch: one(branch) and other(branch)
