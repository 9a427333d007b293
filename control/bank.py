"""Bank: unedited tensors of chosen calls, kept so that other steps and later runs can take from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from probe.call import AttentionCall
from probe.entry import index_of
from probe.errors import PlanError, UsageError
from probe.layout import TokenLayout
from probe.plan import Handler, Stage
from probe.site import Branch, Site, Where, chosen
from probe.word import Prompt

NAMES = {"q": "q", "k": "k", "v": "v", "o": "out"}
"""What a call names the tensors of an edit."""


@dataclass(frozen=True, eq=False)
class Given:
    """What one branch gives at one call: q and o [h, N, D], k and v [h, M, D], of the h heads `heads`, unedited.

    `rows` and `columns` are their tokens, text that is hidden at the end included; the first `visible` keys may be
    seen.
    """

    site: Site
    branch: Branch
    heads: tuple[int, ...]
    tensors: Mapping[str, Tensor]
    rows: TokenLayout
    columns: TokenLayout
    visible: int

    def layout(self, name: str) -> TokenLayout:
        """The tokens of a tensor."""
        return self.columns if name in "kv" else self.rows

    def take(self, name: str, heads: tuple[int, ...]) -> Tensor:
        """A tensor at some heads, [h, N, D].

        Raises:
            PlanError: the tensor or a head was not kept.
        """
        if name not in self.tensors or not set(heads) <= set(self.heads):
            raise PlanError(
                f"A source must have the tensors and heads taken from it. Got {name} of heads {heads} asked of "
                f"{self.branch} at {self.site}, which has {''.join(self.tensors)} of heads {self.heads}. Bank these "
                "too."
            )
        if heads == self.heads:
            return self.tensors[name]
        return self.tensors[name][index_of([self.heads.index(head) for head in heads], self.tensors[name].device)]

    @property
    def bytes(self) -> int:
        """Memory of the tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())


def own_of(call: AttentionCall, entry: int, names: str, heads: tuple[int, ...]) -> Given:
    """What a batch entry of a call gives, in the tensors of the call. The output is the one before merges; it exists
    once the attention ran.

    Raises:
        PlanError: the output is asked for before.
    """
    if "o" in names and "out" not in call.own:
        raise PlanError(
            f"An output can be read once the attention ran. Got o asked for before, at {call.site}. Take o in a "
            "Transfer of o, or features of q, k or v."
        )
    index = index_of(heads, call.q.device)
    tensors = {name: call.own[NAMES[name]][entry, index] for name in names}
    visible = call.columns.total if call.visible is None else call.visible[entry]
    return Given(call.site, call.branches[entry], heads, tensors, call.rows, call.columns, visible)


def kept(given: Given, device: torch.device | str | None = None) -> Given:
    """The same in memory of its own, on a device."""
    tensors = {name: x.detach().to(device or x.device, copy=True) for name, x in given.tensors.items()}
    return replace(given, tensors=tensors)


def on(like: Tensor, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors on the device and in the dtype of another."""
    return {name: x.to(like.device, like.dtype) for name, x in tensors.items()}


_Place = tuple[int, int, str, Branch]


@dataclass(eq=False)
class Bank(Handler):
    """Keeps `tensors` (any of q, k, v, o) of the calls, heads and branches `where` selects, as the model made them,
    after QK-norm and RoPE. Changes nothing.

    `Stored(bank)` takes from it: in later steps of the same run (head freeze, "kv" of one step in all later ones), or
    in a later run (two passes; the values of an inversion, as RF-Solver-Edit, arXiv 2411.04746). A run with the bank
    among its handlers empties it first, unless it is `frozen`: then it keeps what it has and takes nothing new. A run
    that only reads it leaves it alone. Where a step evaluates a branch more than once, each turn is kept.

    `device` is where the tensors lie, "cpu" to spare the accelerator; None leaves them where they are. Memory:
    `predicted_bytes` before, `bytes` after; all of q, k, v of all layers and steps of a large model is hundreds of GB,
    so select.

    Raises:
        UsageError: `tensors` names none or an unknown tensor.
    """

    tensors: str
    where: Where = field(default_factory=Where)
    device: torch.device | str | None = None
    frozen: bool = False
    stage: Stage = field(init=False)

    def __post_init__(self) -> None:
        refuse_names("Bank", self.tensors)
        self.stage = Stage.USED if "o" in self.tensors else Stage.BEFORE
        self._kept: dict[_Place, dict[int, Given]] = {}

    def __str__(self) -> str:
        return f"Bank({self.tensors}{', frozen' if self.frozen else ''})"

    def __len__(self) -> int:
        """Calls of a branch it holds."""
        return sum(len(turns) for turns in self._kept.values())

    def begin(self, prompts: Sequence[Prompt], steps: int, layers: int) -> None:
        """Forget the last run, unless frozen."""
        if not self.frozen:
            self.clear()

    def clear(self) -> None:
        """Let go of everything."""
        self._kept = {}

    def serve(self, call: AttentionCall, rows: tuple[int, ...]) -> None:
        """Keep the tensors of each selected batch entry."""
        if self.frozen:
            return
        site, heads = call.site, self.where.head_list(call.q.shape[1])
        for row in rows:
            given = kept(own_of(call, row, self.tensors, heads), self.device)
            for branch in call.standing(row):
                self._kept.setdefault((site.step, site.layer, site.kind, branch), {})[site.turn] = given

    def find(self, step: int, layer: int, kind: str, branch: Branch, turn: int = 0) -> Given | None:
        """What was kept of a branch: of the same turn, else of the last one; None if nothing."""
        turns = self._kept.get((step, layer, kind, branch), {})
        return turns.get(turn, next(reversed(turns.values()), None))

    @property
    def bytes(self) -> int:
        """Memory it holds."""
        every = (given for turns in self._kept.values() for given in turns.values())
        return sum(given.bytes for given in {id(given): given for given in every}.values())

    def predicted_bytes(
        self, layout: TokenLayout, steps: int, layers: int, heads: int, width: int, branches: int = 1, itemsize: int = 2
    ) -> int:
        """Memory after a run on joint attention of `heads` heads of `width` channels, for so many selected branches of
        an element size.
        """
        calls = len(chosen(self.where.steps, steps)) * len(chosen(self.where.layers, layers))
        vector = len(self.where.head_list(heads)) * width * itemsize
        return calls * branches * len(self.tensors) * layout.total * vector


def refuse_names(what: str, names: str) -> None:
    """Refuse tensors that an attention call does not have.

    Raises:
        UsageError: none, an unknown one, or one twice.
    """
    if not names or set(names) - set(NAMES) or len(set(names)) < len(names):
        raise UsageError(f"A {what} must name tensors among q, k, v, o. Got {names!r}. Write for example 'kv'.")
