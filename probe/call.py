"""One attention call as handlers see it. Shapes: q, k, v, out [B, H, N, D]; lse [B, H, N]."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from probe import attend
from probe.layout import TokenLayout
from probe.site import Branch, Site
from probe.word import Prompt


@dataclass
class AttentionCall:
    """The tensors of one call after QK-norm and RoPE, where it is, and what its batch entries and tokens mean.

    Edits rebind `q`, `k`, `v` (never write into them: the model may hold views); merges rebind `out`.
    """

    site: Site
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float | None
    layout: TokenLayout
    branches: tuple[Branch, ...]
    prompts: tuple[Prompt, ...] = ()
    out: Tensor | None = None
    _lse: Tensor | None = field(default=None, repr=False)

    def prompt_of(self, branch: Branch) -> Prompt | None:
        """The prompt whose words this branch shows, None when the run was told none."""
        return self.prompts[branch.nearest] if self.prompts else None

    def rebind(self, **tensors: Tensor) -> None:
        """Replace some of q, k, v; what was derived from the old ones is forgotten."""
        for name, tensor in tensors.items():
            setattr(self, name, tensor)
        self._lse = None

    def lse(self) -> Tensor:
        """Row log-normaliser over all keys of the current q and k. Computed once and shared by all readouts."""
        if self._lse is None:
            self._lse = attend.partial(self.q, self.k, self.v, self.scale).lse
        return self._lse

    def run_with_lse(self) -> None:
        """Compute the attention now, with its lse, if that gives the bits the model's own call would give."""
        state = attend.plain(self.q, self.k, self.v, self.scale)
        if state is not None:
            self.out, self._lse = state
