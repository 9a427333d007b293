"""One attention call as handlers see it. Shapes: q, out [B, H, N, D]; k, v [B, H, M, D]; lse [B, H, N]."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from probe import attend
from probe.entry import Entry, Place, index_of
from probe.errors import TapError
from probe.layout import TokenLayout
from probe.site import SPLIT, Branch, Site, Where
from probe.weigh_entry import extra_channels, reweighted
from probe.word import Prompt

if TYPE_CHECKING:
    from probe.block import Later
    from probe.change import Change
    from probe.models.rope import Rope

_PART_BYTES = 2**28
"""Most memory that the outputs of parts take at once."""


@dataclass
class AttentionCall:
    """The tensors of one call after QK-norm and RoPE, where it is, and what its batch entries and tokens mean.

    Edits rebind `q`, `k`, `v` (never write into them: the model may hold views); merges rebind `out`. `own` keeps the
    tensors as the model made them, so that what a source gives does not depend on the order of edits. `layout` is the
    joint sequence; `rows` and `columns` are what this call's queries and keys are, which differ in self and cross
    attention. `stands` are the told branches of each batch entry where one stands for several with the same input, in
    layers that are computed once for all of them. `changes` are what edits do to the weights, `later` what they ask for
    when the module, the feed-forward or the block returns. `rope` is how the model rotates q and k, None where it does
    not. `mask` is the model's own key mask [B or 1, 1, 1, M], True = may be seen, and `visible` the keys each batch
    entry may see, always the first ones. `native` says that the model attends through torch's own kernels.
    """

    site: Site
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float | None
    layout: TokenLayout
    branches: tuple[Branch, ...]
    prompts: tuple[Prompt, ...] = ()
    stands: tuple[tuple[Branch, ...], ...] = ()
    mask: Tensor | None = None
    visible: tuple[int, ...] | None = None
    native: bool = True
    out: Tensor | None = None
    rope: Rope | None = None
    changes: list[Change] = field(default_factory=list, repr=False)
    later: list[Later] = field(default_factory=list, repr=False)
    own: dict[str, Tensor] = field(init=False, repr=False)
    _computed: list[tuple[tuple[Place, Place], attend.State]] = field(default_factory=list, init=False, repr=False)
    _lse: Tensor | None = field(default=None, init=False, repr=False)
    _shares: Tensor | None = field(default=None, init=False, repr=False)
    _entries: dict[tuple[int, tuple[int, ...]], Entry] = field(default_factory=dict, init=False, repr=False)
    _writable: set[str] = field(default_factory=set, init=False, repr=False)

    def __post_init__(self) -> None:
        self.own = {"q": self.q, "k": self.k, "v": self.v}
        if self.rows.total != self.q.shape[-2] or self.columns.total != self.k.shape[-2]:
            raise TapError(
                f"A call must have the tokens of its layout. Got {self.q.shape[-2]} rows and {self.k.shape[-2]} "
                f"columns at {self.site} for {self.layout}. The model arranges its tokens in another way."
            )

    def standing(self, row: int) -> tuple[Branch, ...]:
        """The branches that a batch entry is: several where equal ones are computed once."""
        return self.stands[row] if self.stands else (self.branches[row],)

    def rows_of(self, where: Where) -> tuple[int, ...]:
        """The batch entries of which a branch is selected."""
        return tuple(row for row in range(len(self.branches)) if where.rows(self.standing(row)))

    def row_of(self, branch: Branch) -> int | None:
        """The batch entry that is, or stands for, a branch; None if none is."""
        return next((row for row, own in enumerate(self.branches) if branch in (own, *self.standing(row))), None)

    @property
    def rows(self) -> TokenLayout:
        """The queries."""
        return self.layout.with_text(0) if self.site.kind in SPLIT else self.layout

    @property
    def columns(self) -> TokenLayout:
        """The keys."""
        if self.site.kind == "cross":
            return self.layout.text_alone(self.layout.text)
        return self.rows

    @property
    def bias(self) -> Tensor | None:
        """The mask as numbers to add to the logits: 0 where a key may be seen, else -inf."""
        return attend.as_bias(self.mask, self.q.dtype)

    def entry(self, row: int, heads: tuple[int, ...] | None = None) -> Entry:
        """One batch entry for readouts: all heads or some, the keys and rows it may see. Made once and shared.

        It carries the lse and shares of the call if these are there by now; else it makes its own when asked. Once
        changed attention is computed, it shows the weights that were used; before, those of q and k.

        Raises:
            PlanError: its weights were changed in a way that readouts cannot see.
        """
        heads = tuple(range(self.q.shape[1])) if heads is None else heads
        if (row, heads) not in self._entries:
            self._entries[row, heads] = self._entry(row, heads)
        entry, some = self._entries[row, heads], index_of(heads, self.q.device)
        if self._computed:  # the lse of changed weights is not that of q and k
            self.lse()
        lse, shares = (x if x is None else x[row, some][:, : entry.rows.total] for x in (self._lse, self._shares))
        if self._computed and lse is not None:
            lse = lse.masked_fill(lse.isneginf(), torch.inf)
        entry.given_lse, entry.given_shares = lse, shares
        return entry

    def rebind(self, **tensors: Tensor) -> None:
        """Replace some of q, k, v; what was derived from the old ones is forgotten."""
        for name, tensor in tensors.items():
            setattr(self, name, tensor)
        self._forget()

    def _forget(self) -> None:
        self._lse = self._shares = None
        self._entries, self._computed = {}, []

    def writable(self, name: str) -> Tensor:
        """One of q, k, v, out as a tensor an edit may write into: copied at the first ask of a call."""
        if name not in self._writable:
            self._writable.add(name)
            self.rebind(**{name: getattr(self, name).clone()})
        self._forget()
        return getattr(self, name)

    def change(self, change: Change) -> None:
        """Change the weights of an entry; the attention is then computed by `probe.weigh`."""
        self.changes.append(change)
        self._forget()

    def lse(self) -> Tensor:
        """Row log-normaliser over all keys of the current q and k, of the changed weights where these were computed.
        Computed once and shared by all readouts.
        """
        if self._lse is None:
            made = sum(state.lse[..., 0].numel() for _, state in self._computed)
            if made == self.q[..., 0, 0].numel():
                lse = self.q.new_empty(self.q.shape[:-1], dtype=attend.exact_dtype(self.q.dtype))
            else:
                lse = attend.partial(self.q, self.k, self.v, self.scale, self.bias).lse
            for at, state in self._computed:
                lse[at] = state.lse
            self._lse = lse
        return self._lse

    def computed(self, entries: tuple[int, ...], heads: tuple[int, ...], state: attend.State) -> None:
        """Take the attention of some entries and heads, out [b, h, N, D] and lse [b, h, N], from where it was made."""
        rows, some = (index_of(places, self.q.device) for places in (entries, heads))
        if not isinstance(rows, slice) and not isinstance(some, slice):
            rows = rows[:, None]
        self._computed.append(((rows, some), state))
        self._lse, self._entries = None, {}

    def over(self, out: Tensor | None = None) -> Tensor:
        """`out` [B, H, N, D] with what was computed in its places; needs none if that is all of it."""
        if out is not None and not self._computed:
            return out
        if len(self._computed) == 1 and self._computed[0][1].out.shape == self.q.shape:
            return self._computed[0][1].out
        out = torch.empty_like(self.q) if out is None else out.clone()
        for at, state in self._computed:
            out[at] = state.out
        return out

    def run_with_lse(self) -> None:
        """Compute the attention now, with its lse, if that gives the bits the model's own call would give."""
        state = attend.plain(self.q, self.k, self.v, self.scale, self.mask) if self.native else None
        if state is not None:
            self.out, self._lse = state

    def run_in_parts(self) -> None:
        """Compute the attention as one part per frame and text: the output, the lse and the mass of every part at
        once, equal to the plain output up to rounding.

        Where all entries of a masked call may see the same first keys, these alone are the columns; another masked
        call is left alone. Some heads at a time, so that memory stays bounded.
        """
        if self.mask is not None and (self.visible is not None and len(set(self.visible)) > 1):
            return
        parts = self.sides(0)[1].parts()
        if len(parts) < 2:
            return
        heads = max(1, _PART_BYTES // (4 * len(parts) * self.q[:, 0].numel()))
        made = [self._in_parts(parts, slice(at, at + heads)) for at in range(0, self.q.shape[1], heads)]
        self.out, self._lse, self._shares = (torch.cat(side, 1) for side in zip(*made, strict=True))

    def _in_parts(self, parts: tuple[slice, ...], heads: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Output, lse and shares [B, h, N, parts] of some heads."""
        q, k, v = self.q[:, heads], self.k[:, heads], self.v[:, heads]
        states = [attend.partial(q, k[..., part, :], v[..., part, :], self.scale) for part in parts]
        out, lse = attend.merge(*states)
        return out, lse, torch.stack([attend.mass(state, lse) for state in states], -1)

    def sides(self, row: int) -> tuple[TokenLayout, TokenLayout]:
        """Rows and columns of a batch entry without the text that is hidden at the end."""
        rows, columns = self.rows, self.columns
        hidden = 0 if self.visible is None else columns.total - self.visible[row]
        rows, columns = (side.with_text(side.text - hidden) if side.text else side for side in (rows, columns))
        return rows, columns

    def _entry(self, row: int, heads: tuple[int, ...]) -> Entry:
        rows, columns = self.sides(row)
        q, k, v = (x[row, index_of(heads, x.device)] for x in (self.q, self.k, self.v))
        entry = Entry(
            site=self.site,
            branch=self.branches[row],
            q=q[:, : rows.total],
            k=k[:, : columns.total],
            v=v[:, : columns.total],
            scale=attend.scale_of(self.q, self.scale),
            rows=rows,
            columns=columns,
            prompts=self.prompts,
            heads=heads,
        )
        return self._reweighted(entry, row) if self._computed else entry

    def _reweighted(self, entry: Entry, row: int) -> Entry:
        """With its changes; all entries of the call equally wide, so that they can be compared."""
        changes = [[change for change in self.changes if change.entry == at] for at in range(len(self.q))]
        sides = [self.sides(at) for at in range(len(self.q))]
        needs = [
            extra_channels(some, rows.total, columns.total, self.q.dtype)
            for some, (rows, columns) in zip(changes, sides, strict=True)
        ]
        return reweighted(entry, changes[row], max(needs))
