"""Other ways to attend for some rows of a call: what a Fork mixes into the output.

Each gives a state: out [h, n, D] and lse [h, n], so that variants can also be merged as keys of one softmax.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence

from torch import Tensor

from control.address import Area, inside
from control.edit import Edit
from control.shadow import shadow
from probe import attend, weigh
from probe.attend import State
from probe.call import AttentionCall
from probe.entry import Place, index_of
from probe.errors import UsageError
from probe.layout import TokenLayout
from probe.plan import Stage
from probe.site import Branch
from probe.word import Prompt


class Variant(ABC):
    """A way to attend. `kinds` are the kinds of attention it makes sense in, None for any."""

    kinds: frozenset[str] | None = None
    met = True
    """Whether it could change a call of this run."""

    def begin(self, prompts: Sequence[Prompt], steps: int, layers: int) -> None:  # noqa: B027 (optional)
        """Called once when a run starts."""

    def end(self) -> None:  # noqa: B027 (optional)
        """Called once when a run ends."""

    @abstractmethod
    def attend(self, call: AttentionCall, entry: int, heads: Place, rows: Place) -> State | None:
        """Out [h, n, D] and lse [h, n] of some heads and rows of a batch entry; None where it changes nothing."""

    def treats(self, branch: Branch) -> Hashable:
        """What of it depends on the branch, see `Handler.treats`."""
        return None

    def cost(self, layout: TokenLayout) -> float:
        """Work as a share of the plain attention of the same rows."""
        return 0.0

    def __str__(self) -> str:
        return type(self).__name__


class Edited(Variant):
    """The attention after further `edits`, which start from the call as the other edits of the plan left it; with
    `fresh`, from the call as the model made it.

    They are applied to a copy, in the order of their ranks, where their own `where` and strength say so; where none
    applies nothing is attended. Only the rows asked for are attended, unless an edit changes weights. A source in an
    earlier call of the step (Mochi) is only seen if the `where` of the Fork selects that call too.

    Raises:
        UsageError: no edit, or one that changes the output rather than q, k, v or the weights.
    """

    def __init__(self, *edits: Edit, fresh: bool = False) -> None:
        late = [str(edit) for edit in edits if edit.stage != Stage.EDIT or "out" in edit.touches]
        if late or not edits:
            raise UsageError(
                f"A variant must be made of edits of q, k, v or the weights. Got {', '.join(late) or 'none'}. Apply "
                "edits of the output beside the Fork."
            )
        self.edits, self.fresh = sorted(edits, key=lambda edit: edit.rank), fresh

    def begin(self, prompts: Sequence[Prompt], steps: int, layers: int) -> None:
        """Tell the edits that a run starts."""
        self.steps, self.layers, self.met = steps, layers, True
        self._applied = False
        for edit in self.edits:
            edit.begin(prompts, steps, layers)

    def end(self) -> None:
        """Tell the edits that it ends."""
        for edit in self.edits:
            edit.end()

    def attend(self, call: AttentionCall, entry: int, heads: Place, rows: Place) -> State | None:
        """The attention of the edited copy, None if no edit changed it."""
        copy = shadow(call)
        if self.fresh:
            copy.rebind(**{name: copy.own[name] for name in "qkv"})
            copy.changes = []
        for edit in self.edits:
            here = edit.where.at(call.site, self.steps, self.layers) and entry in call.rows_of(edit.where)
            if here and (edit.kinds is None or call.site.kind in edit.kinds):
                edit.serve(copy, (entry,))
                self._applied = True
        self.met = self._applied
        if copy.later:
            raise UsageError(f"A variant must stay inside the attention. Got {self}, which changes what follows it.")
        same = copy.changes == call.changes and all(getattr(copy, x) is getattr(call, x) for x in ("q", "k", "v"))
        return None if same else attended(copy, entry, heads, rows)

    def treats(self, branch: Branch) -> Hashable:
        """What each edit does."""
        return tuple(edit.treats(branch) for edit in self.edits)

    def cost(self, layout: TokenLayout) -> float:
        """One more attention, and what the edits add."""
        return 1.0 + sum(edit.cost(layout) for edit in self.edits)

    def __str__(self) -> str:
        return f"Edited({', '.join(map(str, self.edits))})"


def attended(call: AttentionCall, entry: int, heads: Place, rows: Place, columns: Tensor | None = None) -> State:
    """The attention of some heads and rows of a batch entry as the call stands: out [h, n, D], lse [h, n].

    Over the keys it may see, or those of them in `columns` (bool [M], weights unchanged by edits only).
    """
    if any(change.entry == entry for change in call.changes):
        out, lse = weigh.attention(call, entry)
        return State(out[picked(heads, rows)], lse[picked(heads, rows)])
    seen = call.sides(entry)[1].total
    keys = slice(seen) if columns is None else columns[:seen].nonzero().flatten()
    q = call.q[entry][picked(heads, rows)]
    k, v = (x[entry][heads][:, keys] for x in (call.k, call.v))
    out, lse = attend.partial(q[None], k[None], v[None], call.scale)
    return State(out[0], lse[0])


def visible(tensor: Tensor, call: AttentionCall, entry: int, area: Area | None = None) -> Tensor:
    """Keys or values [H, M, D] of an entry without those it may not see, or those in an area."""
    keys = slice(call.sides(entry)[1].total) if area is None else inside(area, call, entry, "columns")
    return tensor[:, keys]


def picked(heads: Place, rows: Place) -> tuple[Place, Place]:
    """The index of some heads and rows of [H, N, ...], for reading and writing."""
    if isinstance(heads, Tensor) and isinstance(rows, Tensor):
        return heads.unsqueeze(1), rows
    return heads, rows


def places(positions: Tensor) -> Place:
    """Rows of a bool mask [N] as an index: all of them as a slice."""
    found = positions.nonzero().flatten()
    return slice(None) if len(found) == len(positions) else found


def head_place(call: AttentionCall, heads: tuple[int, ...]) -> Place:
    """Heads as an index."""
    return index_of(heads, call.q.device)
