"""One attention call as handlers see it. Shapes: q, out [B, H, N, D]; k, v [B, H, M, D]; lse [B, H, N]."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from probe import attend
from probe.entry import Entry
from probe.errors import TapError
from probe.layout import TokenLayout
from probe.site import SPLIT, Branch, Site
from probe.word import Prompt


@dataclass
class AttentionCall:
    """The tensors of one call after QK-norm and RoPE, where it is, and what its batch entries and tokens mean.

    Edits rebind `q`, `k`, `v` (never write into them: the model may hold views); merges rebind `out`. `own` keeps the
    tensors as the model made them, so that what a source gives does not depend on the order of edits. `layout` is the
    joint sequence; `rows` and `columns` are what this call's queries and keys are, which differ in self and cross
    attention. `mask` is the model's own key mask [B or 1, 1, 1, M], True = may be seen, and `visible` the keys each
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
    own: dict[str, Tensor] = field(init=False, repr=False)
    _lse: Tensor | None = field(default=None, repr=False)
    _shares: Tensor | None = field(default=None, repr=False)
    _entries: dict[tuple[int, tuple[int, ...]], Entry] = field(default_factory=dict, repr=False)

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
        """One batch entry for readouts: all heads or some, the keys and rows it may see. Made once and shared."""
        heads = tuple(range(self.q.shape[1])) if heads is None else heads
        if (row, heads) not in self._entries:
            self._entries[row, heads] = self._entry(row, heads)
        return self._entries[row, heads]

    def rebind(self, **tensors: Tensor) -> None:
        """Replace some of q, k, v; what was derived from the old ones is forgotten."""
        for name, tensor in tensors.items():
            setattr(self, name, tensor)
        self._lse = self._shares = None
        self._entries = {}

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
        once, equal to the plain output up to rounding. A masked call is left alone.
        """
        if self.mask is not None or len(self.columns.parts()) < 2:
            return
        states = [
            attend.partial(self.q, self.k[..., part, :], self.v[..., part, :], self.scale)
            for part in self.columns.parts()
        ]
        self.out, self._lse = attend.merge(*states)
        self._shares = torch.stack([attend.mass(state, self._lse) for state in states], -1)

    def _entry(self, row: int, heads: tuple[int, ...]) -> Entry:
        every = len(heads) == self.q.shape[1]
        pick = slice(None) if every else list(heads)
        rows, columns = self.rows, self.columns
        seen = columns.total if self.visible is None else self.visible[row]
        if seen < columns.total:  # the text that is hidden stands at the end
            rows, columns = (side.with_text(side.text - columns.total + seen) for side in (rows, columns))
        q, k, v = self.q[row, pick], self.k[row, pick][:, :seen], self.v[row, pick][:, :seen]
        return Entry(
            site=self.site,
            branch=self.branches[row],
            q=q[:, : rows.total],
            k=k,
            v=v,
            scale=attend.scale_of(self.q, self.scale),
            rows=rows,
            columns=columns,
            prompts=self.prompts,
            heads=heads,
            given_lse=self.lse()[row, pick][:, : rows.total],
            given_shares=None if self._shares is None else self._shares[row, pick],
        )
