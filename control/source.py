"""Where a Transfer takes from: another branch of the step, the branch itself, a constant, or a bank."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace

import torch

from control.address import Area
from control.bank import Bank, Given, kept, on, own_of
from probe.call import AttentionCall
from probe.errors import PlanError
from probe.site import Branch, Site

OfBranch = Callable[[Branch], Branch | None]
"""From a target's branch to its source's branch; None leaves the target alone."""


@dataclass(frozen=True)
class Ask:
    """What a target asks of its source: tensors (any of q, k, v, o), heads, and the rows it will change."""

    names: str
    heads: tuple[int, ...]
    rows: Area | None = None


class Source(ABC):
    """Gives the unedited tensors of a branch: what an edit did to it in this call does not reach its takers. `early`:
    it may also give those of earlier calls of the step.
    """

    early: bool = False

    def begin(self) -> None:  # noqa: B027 (optional)
        """Forget the last run."""

    def end(self) -> None:  # noqa: B027 (optional)
        """Let go of what was kept for the run."""

    def may_give(self, branch: Branch, aims: Callable[[Branch], bool], prompts: int) -> bool:
        """Whether targets that lie in later calls of the step could take from this branch; `aims` says which branches
        are targets, in a run of `prompts` prompts (0: not known).
        """
        return False

    def treats(self, target: Branch) -> Hashable:
        """What of it depends on the target's branch, see `Handler.treats`."""
        return None

    def watch(self, call: AttentionCall, ask: Ask, givers: tuple[int, ...], targets: tuple[int, ...]) -> None:  # noqa: B027 (optional)
        """See a call before its targets are served: `givers` are the batch entries that `may_give`."""

    @abstractmethod
    def given(self, call: AttentionCall, entry: int, ask: Ask) -> Given | None:
        """What the batch entry takes from; None leaves it alone.

        Raises:
            PlanError: the source is not there.
        """


@dataclass(eq=False)
class Peer(Source):
    """Another branch of the same layer and step: prompt `of` (the branch that equals the target but for its prompt), or
    a function from the target's branch to it.

    It may be served in the same call, or in an earlier call or turn of the step: Mochi attends to one batch entry at a
    time, and Wan, FLUX and HunyuanVideo run the halves of guidance one after the other. There, tensors that no target
    of their own call takes are kept until the step changes; with `keep` also the others (targets in several turns of a
    step), with `once` only until they are taken (each has one target). `device` is where they are kept, None where they
    are. A function needs `among`, which says what branches are kept; a prompt tells that itself.
    """

    of: int | OfBranch
    among: Callable[[Branch], bool] | None = None
    keep: bool = False
    once: bool = False
    device: torch.device | str | None = None

    def __post_init__(self) -> None:
        self.early = isinstance(self.of, int) or self.among is not None
        self.begin()

    def __str__(self) -> str:
        return f"prompt {self.of}" if isinstance(self.of, int) else getattr(self.of, "__name__", "source")

    def begin(self) -> None:
        """Forget the last run."""
        self._step, self._kept = -1, dict[tuple[int, str, Branch, Ask], Given]()

    def end(self) -> None:
        """Let go of the last step."""
        self.begin()

    @property
    def bytes(self) -> int:
        """Memory of what is kept of the step."""
        return sum(given.bytes for given in self._kept.values())

    def branch_of(self, target: Branch) -> Branch | None:
        """The source of a target."""
        return replace(target, prompt=self.of) if isinstance(self.of, int) else self.of(target)

    def treats(self, target: Branch) -> Hashable:
        """The prompt, or the source that a function gives."""
        return self.of if isinstance(self.of, int) else self.of(target)

    def may_give(self, branch: Branch, aims: Callable[[Branch], bool], prompts: int) -> bool:
        """Whether it is the source of some target."""
        if not isinstance(self.of, int):
            return self.among is not None and self.among(branch)
        others = (replace(branch, prompt=prompt) for prompt in range(prompts) if prompt != self.of)
        return branch.prompt == self.of and (not prompts or any(aims(other) for other in others))

    def watch(self, call: AttentionCall, ask: Ask, givers: tuple[int, ...], targets: tuple[int, ...]) -> None:
        """Keep sources for later calls of the step."""
        if call.site.step != self._step:
            self._step, self._kept = call.site.step, {}
        branches = [call.branches[target] for target in targets]
        here = {self.branch_of(branch) for branch in branches if self.branch_of(branch) != branch}
        for giver in givers:
            branch = call.branches[giver]
            place = (call.site.layer, call.site.kind, branch, ask)
            known = place in self._kept and self._kept[place].site == call.site
            if not known and (self.keep or branch not in here):
                self._kept[place] = kept(own_of(call, giver, ask.names, ask.heads), self.device)

    def given(self, call: AttentionCall, entry: int, ask: Ask) -> Given | None:
        """The source, of this call or of an earlier one of the step."""
        source = self.branch_of(call.branches[entry])
        if source is None:
            return None
        row = call.row_of(source)
        if row is not None:
            return own_of(call, row, ask.names, ask.heads)
        place = call.site.layer, call.site.kind, source, replace(ask, rows=None)
        if place not in self._kept:
            raise PlanError(self._missing(call, call.branches[entry], source))
        found = self._kept.pop(place) if self.once else self._kept[place]
        return replace(found, tensors=on(call.q, found.tensors))

    def _missing(self, call: AttentionCall, target: Branch, source: Branch) -> str:
        layer, kind = call.site.layer, call.site.kind
        kept = [f"{one} at {given.site}" for (*at, one, _), given in self._kept.items() if at == [layer, kind]]
        return (
            "The source of a Transfer must be in the same attention call as its target, or in an earlier call of the "
            f"step. Got {source} for {target} at {call.site}, which has: {'; '.join(map(str, call.branches))}; earlier "
            f"calls gave: {'; '.join(kept) or 'none'}. Generate both in one run with the source first, or take it from "
            "a Bank."
        )


@dataclass(eq=False)
class Itself(Source):
    """The target's own branch: with a mapping, its other rows."""

    def __str__(self) -> str:
        return "itself"

    def given(self, call: AttentionCall, entry: int, ask: Ask) -> Given:
        """Its own unedited tensors."""
        return own_of(call, entry, ask.names, ask.heads)


class Recalled(Given):
    """What is given by a bank: of another call or run, whose prompts need not be those of this one."""


@dataclass(eq=False)
class Stored(Source):
    """What a bank holds: of the same step, layer and branch, or of those that `step` (a number or a function of the
    target's step), `layer` and `branch` (a prompt, or a function of the target's branch) say.

    With a `Bank("qk", Where(steps=5))` in the same run, `Transfer("qk", Stored(bank, step=5))` from step 6 on gives a
    head the map of step 5 (head freeze); to mix outputs rather than queries and keys, use it as the variant of a Fork.
    """

    bank: Bank
    step: int | Callable[[int], int] | None = None
    layer: int | None = None
    branch: int | OfBranch | None = None

    def __str__(self) -> str:
        at = {"step": self.step, "layer": self.layer}
        return ", ".join(["bank", *(f"{name} {value}" for name, value in at.items() if isinstance(value, int))])

    def given(self, call: AttentionCall, entry: int, ask: Ask) -> Given | None:
        """What was kept, on the device of the call."""
        branches = [self._branch(told) for told in call.standing(entry)]
        branch = branches[0]
        if branch is None:
            return None
        step, layer = self._step(call.site.step), call.site.layer if self.layer is None else self.layer
        every = (self.bank.find(step, layer, call.site.kind, one, call.site.turn) for one in branches if one)
        found = next((one for one in every if one is not None), None)
        if found is None:
            there = Site(step, call.site.turn, layer, kind=call.site.kind)
            raise PlanError(
                f"A bank must hold a call before it is taken from. Got {call.branches[entry]} at {call.site}, which "
                f"takes from {branch} at {there}: {self.bank} holds {len(self.bank)} others. Let the where of the bank "
                "select that call, in an earlier run or step."
            )
        tensors = on(call.q, {name: x for name, x in found.tensors.items() if name in ask.names})
        return Recalled(**{**vars(found), "tensors": tensors})

    def treats(self, target: Branch) -> Hashable:
        """The branch that is taken from: roles are kept apart."""
        return self._branch(target)

    def _branch(self, target: Branch) -> Branch | None:
        if self.branch is None:
            return target
        return replace(target, prompt=self.branch) if isinstance(self.branch, int) else self.branch(target)

    def _step(self, step: int) -> int:
        if self.step is None:
            return step
        return self.step if isinstance(self.step, int) else self.step(step)


def source_of(given: int | OfBranch | Source) -> Source:
    """A source as it is given to an edit: a prompt and a function of a branch are peers."""
    return given if isinstance(given, Source) else Peer(given)
