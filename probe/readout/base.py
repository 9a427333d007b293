"""What every readout is: a reduction of one batch entry of one call, kept by where it was seen."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from probe.call import AttentionCall
from probe.entry import Entry, Place
from probe.errors import WordError
from probe.layout import TokenLayout
from probe.plan import Handler, Stage
from probe.site import Branch, Where, Which
from probe.word import Prompt

CONDITIONAL = Which(guided=True)


class At(NamedTuple):
    """Where a value was seen."""

    step: int
    branch: Branch
    layer: int
    kind: str = "joint"
    turn: int = 0


Value = NDArray[np.float32] | dict[str, NDArray[np.float32]]


@dataclass(eq=False)
class Readout(Handler):
    """A handler that only looks. After a run `values[at]` is what `reduce` made of each call, as numpy float32 on the
    CPU (integers and truth values as they are); `layouts[branch]` are the columns it saw.

    Readouts see the conditional branches if `where` does not choose branches itself: the unconditional half of
    guidance shows another prompt. With `stage=Stage.BEFORE` they see the model's own tensors instead of the edited.

    `stored` names the place of the values in a step file: maps, mass, frames, columns, token_mass, text_text, spatial,
    temporal, qk, or none.
    """

    where: Where = field(default_factory=Where)
    stage: Stage = Stage.USED
    needs_lse = True
    stored: ClassVar[str] = ""
    definitions: ClassVar[dict[str, str]] = {}

    def __post_init__(self) -> None:
        if self.where.branches is None:
            self.where = replace(self.where, branches=CONDITIONAL)
        self.begin((), 0, 0)

    def begin(self, prompts: Sequence[Prompt], steps: int, layers: int) -> None:
        """Forget the last run."""
        self.values: dict[At, Any] = {}
        self.layouts: dict[Branch, TokenLayout] = {}

    @abstractmethod
    def reduce(self, entry: Entry) -> Tensor | Mapping[str, Tensor] | None:
        """The values of one entry, on its device; None if it has none."""

    def serve(self, call: AttentionCall, rows: tuple[int, ...]) -> None:
        """Reduce each entry of `rows` and keep the result."""
        site, heads = call.site, self.where.head_list(call.q.shape[1])
        if self.needs_lse:
            call.lse()
        for row in rows:
            entry = call.entry(row, heads)
            made = self.reduce(entry)
            if made is None:
                continue
            value = _kept(made)
            for branch in self.where.rows(call.standing(row)):
                self._keep(At(site.step, call.standing(row)[branch], site.layer, site.kind, site.turn), value, entry)

    def _keep(self, at: At, value: Any, entry: Entry) -> None:
        """One value; entries that stand for several branches are kept for each."""
        self.layouts[at.branch], self.values[at] = entry.columns, value

    def metrics(self, value: Any) -> dict[str, NDArray[np.float32]]:
        """Numbers per head [H] that sum up a value, by name; `definitions` says what each is."""
        return {}

    def table(self, value: Any) -> NDArray[np.float32]:
        """The part of a value that is stored."""
        return value

    def at(self, **asked: Any) -> list[At]:
        """Where there are values, by any fields of At: `at(layer=3, step=0)`; in the order they were seen."""
        return [at for at in self.values if all(getattr(at, name) == value for name, value in asked.items())]


def _kept(made: Tensor | Mapping[str, Tensor]) -> Any:
    if isinstance(made, Mapping):
        return {name: _kept(value) for name, value in made.items()}
    return (made.float() if made.is_floating_point() else made).detach().to("cpu", copy=True).numpy()


def group_means(values: Tensor, groups: Mapping[str, Place], names: Sequence[str]) -> Tensor:
    """Means of values [H, N, ...] over the rows of each named group, [H, groups, ...]; NaN for an empty one."""
    return torch.stack([values[:, groups[name]].mean(1) for name in names], 1)


def refuse_unknown(words: Sequence[str], prompts: Sequence[Prompt]) -> None:
    """Refuse a word that no prompt has, if there are prompts.

    Raises:
        WordError: a word is in none of the prompts; lists the words.
    """
    for word in words if prompts else ():
        if not any(prompt.has(word) for prompt in prompts):
            spoken = "; ".join(", ".join(prompt.words) for prompt in prompts)
            raise WordError(f"A word must be in a prompt. Got {word!r}. The words are: {spoken}.")
