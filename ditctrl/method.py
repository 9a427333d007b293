"""The prediction of DiTCtrl for one step of the long latent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from control.adapter import Loop
from control.denoise import guide
from ditctrl.condition import conditions
from ditctrl.overlap import blend
from ditctrl.segment import Segments
from ditctrl.sharing import Chunks, Turn, Window, turns, unconditional
from probe.clock import Clock
from probe.site import Branch


@dataclass(frozen=True)
class MultiPrompt:
    """Overlapping segments of one long latent, each under its own condition, blended into one prediction.

    Equal, up to rounding, to the authors' schedule of pairs [u_k, u_k+1, c_k, c_k+1] (SA:705-767): `window` says where
    their two roles differ. Both roles of a segment start from the same input and are told to be alike, so that a trace
    computes them once up to the first layer that shares. A step without sharing evaluates each segment once and counts
    it with the pair loop's multiplicity. `window` None is their ablation without KV sharing. The sharing itself is a
    `Transfer` in the trace (`share_previous`).

    `embeddings` is [n, T, E], `negative` [1, T, E] (zeros in the authors' code, SV:272-276, not the encoded empty
    prompt); the latents given to a call are [1, L, C, H, W]. `chunks` says how many segments are in one forward.
    """

    loop: Loop
    segments: Segments
    embeddings: Tensor
    negative: Tensor
    guidance: Callable[[int], float]
    window: Window | None
    clock: Clock
    chunks: Chunks = field(default_factory=Chunks)

    def __call__(self, latents: Tensor, step: int) -> Tensor:
        """The guided, blended model output [1, L, C, H, W]."""
        return blend(self.segments, list(self._parts(latents, step)))

    def _parts(self, latents: Tensor, step: int) -> Iterator[tuple[int, float, Tensor]]:
        """Segment, weight and guided prediction [T, C, H, W] of each evaluation that counts."""
        for number, turn in enumerate(turns(self.segments, self.window, step, self.chunks)):
            guided = self._forward(latents, turn, step, number)
            for branch, prediction in zip(turn.branches[turn.borrowed :], guided[turn.borrowed :], strict=True):
                yield branch.segment, self._weight(branch), prediction

    def _forward(self, latents: Tensor, turn: Turn, step: int, number: int) -> Tensor:
        """The guided predictions of one forward, [branches, T, C, H, W]."""
        half, count = turn.branches, len(turn.branches)
        clips = torch.cat([latents[:, self.segments.window(branch.segment)] for branch in half])
        text = self.conditions[[branch.segment for branch in half]]
        alike = [*turn.alike, *(count + first for first in turn.alike)]
        self.clock.tell(step, self.loop.steps, [*map(unconditional, half), *half], number, alike)
        output = self.loop.forward(torch.cat([clips, clips]), torch.cat([self.negative.expand_as(text), text]), step)
        return guide(output, self.guidance(self.loop.timesteps[step]))

    @cached_property
    def conditions(self) -> Tensor:
        """The text of every segment, [S, T, E]: the same in each step."""
        return conditions(self.segments, self.embeddings)

    def _weight(self, branch: Branch) -> float:
        """The part of its segment's weight that one of its evaluations has."""
        both = branch.role != "plain" and not self.segments.ends(branch.segment)
        return self.segments.multiplicity(branch.segment) / (2 if both else 1)
