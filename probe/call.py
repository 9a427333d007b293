"""One attention call as handlers see it. Shapes: q, k, v, out [B, H, N, D]; lse [B, H, N]."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from probe import attend
from probe.errors import WordError
from probe.layout import TokenLayout
from probe.site import Branch, Site
from probe.word import Prompt


@dataclass
class AttentionCall:
    """The tensors of one call after QK-norm and RoPE, where it is, and what its batch entries and tokens mean.

    Edits rebind `q`, `k`, `v` (never write into them: the model may hold views); merges rebind `out`. `own` keeps the
    tensors as the model made them, so that what a source gives does not depend on the order of edits.
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
    own: dict[str, Tensor] = field(init=False, repr=False)
    _lse: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.own = {"q": self.q, "k": self.k, "v": self.v}

    def prompt_of(self, branch: Branch) -> Prompt:
        """The prompt whose words this branch shows.

        Raises:
            WordError: the run was told no prompts, or the branch is unconditional: it does not show the prompt.
        """
        if not branch.guided:
            raise WordError(
                f"A readout of words or padding must look at conditional branches. Got {branch}. Use "
                "Which(guided=True), or leave branches out."
            )
        if branch.nearest >= len(self.prompts):
            raise WordError(
                f"A readout of words or padding must know the prompt. Got a run that was told {len(self.prompts)}. "
                "Pass prompt=..., or prompts to run()."
            )
        return self.prompts[branch.nearest]

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
