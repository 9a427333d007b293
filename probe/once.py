"""Equal batch entries of a forward are computed once, up to the layer where an edit tells them apart.

No model code is copied: hooks on the blocks leave repeated entries out where the first block begins and put them back
behind the last one that they share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from probe.block import eager
from probe.entry import on_device
from probe.models.family import Family
from probe.plan import Plan
from probe.site import Branch


@dataclass(frozen=True)
class Repeats:
    """Which of `len(place)` batch entries are computed before layer `until`: the entries `kept`; entry i is the
    `place[i]`-th of these.
    """

    kept: tuple[int, ...]
    place: tuple[int, ...]
    until: int

    def stands(self, branches: Sequence[Branch]) -> tuple[tuple[Branch, ...], ...]:
        """For each computed entry the branches that it is."""
        each: list[list[Branch]] = [[] for _ in self.kept]
        for branch, place in zip(branches, self.place, strict=True):
            each[place].append(branch)
        return tuple(map(tuple, each))


def shared(branches: Sequence[Branch]) -> Branch:
    """What an entry is that stands for several: their segment, in no role."""
    return replace(branches[0], role="plain") if len(branches) > 1 else branches[0]


def repeats(alike: Sequence[int], branches: Sequence[Branch], plan: Plan, step: int, turn: int) -> Repeats | None:
    """What can be computed once; None if nothing. `alike[i]` is the first entry with the same input as entry i."""
    kept = tuple(dict.fromkeys(alike))
    if len(kept) == len(branches):
        return None
    whole = Repeats(kept, tuple(kept.index(first) for first in alike), plan.layers)
    until = plan.apart(step, turn, whole.stands(branches))
    return replace(whole, until=until) if until else None


class Once:
    """The hooks. `now` is set before each forward."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self.now: Repeats | None = None

    def at(self, layer: int) -> Repeats | None:
        """What a layer leaves out."""
        return self.now if self.now is not None and layer < self.now.until else None

    def listen(self, model: nn.Module) -> Iterator[Callable[[], None]]:
        """Hook a model, after all other hooks on its blocks; gives what undoes each."""
        for layer, (_, block) in enumerate(self.family.blocks(model)):
            yield block.register_forward_pre_hook(eager(self._enter(layer)), with_kwargs=True).remove
            yield block.register_forward_hook(eager(self._leave(layer))).remove

    def _enter(self, layer: int) -> Callable[..., Any]:
        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            now = self.at(layer)
            if now is None:
                return None
            return tuple(_some(now, x) for x in args), {name: _some(now, x) for name, x in kwargs.items()}

        return enter

    def _leave(self, layer: int) -> Callable[..., Any]:
        def leave(_: nn.Module, __: tuple[Any, ...], out: Any) -> Any:
            now = self.at(layer)
            if now is None or layer != now.until - 1:
                return None
            return tuple(_all(now, x) for x in out) if isinstance(out, tuple) else _all(now, out)

        return leave


def _some(now: Repeats, given: Any) -> Any:
    """The computed entries of a tensor that still has all of them."""
    whole = isinstance(given, Tensor) and given.dim() > 0 and len(given) == len(now.place)
    return given[on_device(now.kept, torch.long, given.device)] if whole else given


def _all(now: Repeats, made: Tensor) -> Tensor:
    return made[on_device(now.place, torch.long, made.device)]
