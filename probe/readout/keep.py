"""Kept Q and K: what the attention of a few chosen calls was made of, to look at any of it afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import DTypeLike
from torch import Tensor

from probe.call import AttentionCall
from probe.entry import Entry
from probe.errors import PlanError, UsageError
from probe.plan import Stage
from probe.readout.base import Readout
from probe.site import Site, Where
from probe.word import Prompt


class KeepQK(Readout):
    """Keeps q and k of chosen (step, layer) pairs, after normalisation and RoPE, of the keys that may be seen.

    After a run `values[at]` is {"q": [H, N, D], "k": [H, M, D]}, numpy in `dtype`, float16 or float32. q is scaled so
    that the logits are q k^T / sqrt(D), whatever scale the model uses. `similarity` compares two of them, and
    `Run.attention_row` computes any row of the map from what a run folder keeps.

    `where` chooses heads and branches, the conditional ones if left out; steps and layers are those of `sites`.

    Errors: none in float32. In float16 a bfloat16 number keeps its bits from 6e-5 to 65504; a float32 number is rounded
    by up to 5e-4 of itself. Cost: no attention; N + M vectors per head and call, 137 MB for CogVideoX-2B in
    float16.
    """

    stored = "qk"
    needs_lse = False

    def __init__(
        self,
        sites: Iterable[tuple[int, int]],
        dtype: DTypeLike = np.float16,
        where: Where | None = None,
        stage: Stage = Stage.USED,
    ) -> None:
        self.sites, self.dtype = tuple(dict.fromkeys(sites)), np.dtype(dtype)
        if self.dtype not in (np.float16, np.float32):
            raise UsageError(f"Kept Q and K must be float16 or float32. Got {self.dtype}. Choose one of them.")
        steps, layers = ({site[axis] for site in self.sites} for axis in (0, 1))
        super().__init__(replace(where or Where(), steps=steps, layers=layers), stage)

    def __str__(self) -> str:
        return f"KeepQK({', '.join(f'step {step} layer {layer}' for step, layer in self.sites)})"

    def begin(self, prompts: Sequence[Prompt], steps: int, layers: int) -> None:
        """Forget the last run.

        Raises:
            UsageError: no sites, or one that the run does not have.
        """
        super().begin(prompts, steps, layers)
        outside = [site for site in self.sites if not (0 <= site[0] < steps and 0 <= site[1] < layers)]
        if steps and (outside or not self.sites):
            raise UsageError(
                f"Sites of kept Q and K must be (step, layer) pairs of steps 0 to {steps - 1} and layers 0 to "
                f"{layers - 1}. Got {outside or 'none'}. Name pairs among those."
            )

    def serve(self, call: AttentionCall, rows: tuple[int, ...]) -> None:
        """Keep the entries of `rows` if the call is one of the chosen pairs."""
        if (call.site.step, call.site.layer) not in self.sites:
            return
        super().serve(call, rows)
        site = call.site
        for at in self.at(step=site.step, layer=site.layer, kind=site.kind, turn=site.turn):
            self.values[at] = {name: self._cast(values, site) for name, values in self.values[at].items()}

    def reduce(self, entry: Entry) -> dict[str, Tensor]:
        """q and k of the entry.

        Raises:
            PlanError: edits left its rows without unit sum, which no softmax of kept q and k can give.
        """
        if not entry.whole:
            raise PlanError(
                "Kept Q and K must be of rows that sum to one. Got raw factors or added keys at "
                f"{entry.site}. Keep them before edits, with stage=Stage.BEFORE, or leave this call out."
            )
        factor = entry.scale * entry.q.shape[-1] ** 0.5
        return {"q": entry.q if abs(factor - 1) < 1e-6 else entry.q.float() * factor, "k": entry.k}

    def _cast(self, values: np.ndarray, site: Site) -> np.ndarray:
        with np.errstate(over="ignore"):
            cast = values.astype(self.dtype)
        if not np.isfinite(cast).all():
            raise UsageError(
                f"Kept Q and K must fit {self.dtype}; float16 ends at 65504. Got {np.abs(values).max():.3g} at {site}. "
                "Keep them in float32, or leave this call out."
            )
        return cast
