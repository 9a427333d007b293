"""The prediction of DiTCtrl for one step of the long latent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from control.adapter import Loop
from control.denoise import guide
from ditctrl.condition import conditions
from ditctrl.overlap import blend
from ditctrl.segment import Segments
from ditctrl.sharing import Window, branches, clip_forwards
from probe.clock import Clock
from probe.site import Branch


@dataclass(frozen=True)
class MultiPrompt:
    """Overlapping segments of one long latent, each under its own condition, blended into one prediction.

    Equal, up to rounding, to the authors' schedule of pairs [u_k, u_k+1, c_k, c_k+1] (SA:705-767): `window` says
    where their two roles differ. All segments of a step are one batch; a step without sharing evaluates each segment
    once and counts it with the pair loop's multiplicity. `window` None is their ablation without KV sharing. The
    sharing itself is a `Transfer` in the trace (`share_previous`).

    `embeddings` is [n, T, E], `negative` [1, T, E] (zeros in the authors' code, SV:272-276, not the encoded empty
    prompt); the latents given to a call are [1, L, C, H, W].
    """

    loop: Loop
    segments: Segments
    embeddings: Tensor
    negative: Tensor
    guidance: Callable[[int], float]
    window: Window | None
    clock: Clock

    def __call__(self, latents: Tensor, step: int) -> Tensor:
        """The guided, blended model output [1, L, C, H, W]."""
        half = branches(self.segments, self.window, step)
        both = [replace(b, guided=False) for b in half] + half
        clips = torch.cat([latents[:, self.segments.window(b.segment)] for b in half])
        text = self.conditions[[b.segment for b in half]]
        self.clock.tell(step, self.loop.steps, both)
        output = self.loop.forward(torch.cat([clips, clips]), torch.cat([self.negative.expand_as(text), text]), step)
        guided = guide(output, self.guidance(self.loop.timesteps[step]))
        return blend(self.segments, [(b.segment, self._weight(b), p) for b, p in zip(half, guided, strict=True)])

    @cached_property
    def conditions(self) -> Tensor:
        """The text of every segment, [S, T, E]: the same in each step."""
        return conditions(self.segments, self.embeddings)

    def sample_forwards(self) -> int:
        """Transformer evaluations of single clips in the whole run, both guidance halves."""
        return sum(clip_forwards(self.segments, self.window, self.loop.steps))

    def _weight(self, branch: Branch) -> float:
        return self.segments.multiplicity(branch.segment) if branch.role == "plain" else 1.0
