"""One attention call as handlers see it. Shapes: q, out [B, H, N, D]; k, v [B, H, M, D]; lse [B, H, N]."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from probe import attend
from probe.entry import Entry, index_of
from probe.errors import TapError
from probe.layout import TokenLayout
from probe.site import SPLIT, Branch, Site
from probe.word import Prompt

if TYPE_CHECKING:
    from probe.block import Later
    from probe.models.rope import Rope
    from probe.weigh import Change

_PART_BYTES = 2**28
"""Most memory that the outputs of parts take at once."""


@dataclass
class AttentionCall:
    """The tensors of one call after QK-norm and RoPE, where it is, and what its batch entries and tokens mean.

    Edits rebind `q`, `k`, `v` (never write into them: the model may hold views); merges rebind `out`. `own` keeps the
    tensors as the model made them, so that what a source gives does not depend on the order of edits. `layout` is the
    joint sequence; `rows` and `columns` are what this call's queries and keys are, which differ in self and cross
    attention. `changes` are what edits do to the weights, `later` what they ask for when the module, the feed-forward or
    the block returns. `rope` is how the model rotates q and k, None where it does not. `mask` is the model's own key mask [B or 1, 1, 1, M], True = may be seen, and `visible` the keys each
    batch entry may see, always the first ones. `native` says that the model attends through torch's own kernels.
    """

    site: Site
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float | None
    layout: TokenLayout
    branches: tuple[Branch, ...]
    prompts: tuple[Prompt, ...] = ()
    mask: Tensor | None = None
    visible: tuple[int, ...] | None = None
    native: bool = True
    out: Tensor | None = None
    rope: Rope | None = None
    changes: list[Change] = field(default_factory=list, repr=False)
    later: list[Later] = field(default_factory=list, repr=False)
    own: dict[str, Tensor] = field(init=False, repr=False)
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

        It carries the lse and shares of the call if these are there by now; else it makes its own when asked.
        """
        heads = tuple(range(self.q.shape[1])) if heads is None else heads
        if (row, heads) not in self._entries:
            self._entries[row, heads] = self._entry(row, heads)
        entry, some = self._entries[row, heads], index_of(heads, self.q.device)
        lse, shares = (x if x is None else x[row, some][:, : entry.rows.total] for x in (self._lse, self._shares))
        entry.given_lse, entry.given_shares = lse, shares
        return entry

    def rebind(self, **tensors: Tensor) -> None:
        """Replace some of q, k, v; what was derived from the old ones is forgotten."""
        for name, tensor in tensors.items():
            setattr(self, name, tensor)
        self._forget()

    def _forget(self) -> None:
        self._lse = self._shares = None
        self._entries = {}

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
        """Row log-normaliser over all keys of the current q and k. Computed once and shared by all readouts."""
        if self._lse is None:
            self._lse = attend.partial(self.q, self.k, self.v, self.scale, self.bias).lse
        return self._lse

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
        return Entry(
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
