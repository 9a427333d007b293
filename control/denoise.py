"""The only denoising loop of our own: a state that can be saved and resumed, advanced by a prediction.

Without edits it is bit-identical to the stock CogVideoX pipeline.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from control.adapter import Loop
from probe.clock import Clock
from probe.site import Branch

Prediction = Callable[[Tensor, int], Tensor]
"""(latents [B, F, C, H, W], step) -> the guided model output for them, float32."""


@dataclass(frozen=True)
class State:
    """Everything the loop needs to go on after `step` finished steps.

    `previous_x0` is the sampler's memory (SDE-DPM-Solver++ 2M), None for DDIM. `generator` is the random state.
    """

    step: int
    latents: Tensor
    previous_x0: Tensor | None
    generator: Tensor

    @classmethod
    def start(cls, loop: Loop, batch: int, frames: int, dtype: torch.dtype) -> State:
        """Pure noise from the loop's seed."""
        latents = loop.noise(batch, frames, dtype)
        return cls(0, latents, None, loop.generator.get_state())


@torch.no_grad()
def denoise(loop: Loop, predict: Prediction, state: State, on_step: Callable[[State], None] | None = None) -> State:
    """Advance `state` to the last step. `on_step` sees each new state.

    `predict` tells the clock step, number of steps and branches before each forward.
    """
    loop.generator.set_state(state.generator)
    for step in range(state.step, loop.steps):
        output = predict(state.latents, step)
        latents, x0 = loop.advance(output, state.latents, state.previous_x0, step)
        state = replace(
            state,
            step=step + 1,
            latents=latents.to(state.latents.dtype),
            previous_x0=x0,
            generator=loop.generator.get_state(),
        )
        if on_step is not None:
            on_step(state)
    return state


@dataclass(frozen=True)
class Guided:
    """Classifier-free guidance of independent clips, as the stock pipeline does it: one batch [unconditional..,
    conditional..].

    `text` and `negative` are [P, T, E]; `guidance(timestep)` the scale of a step. A scale of at most 1 at every step
    needs `negative=None`, which runs the conditional half alone.
    """

    loop: Loop
    text: Tensor
    negative: Tensor | None
    guidance: Callable[[int], float]
    clock: Clock | None = None

    def __call__(self, latents: Tensor, step: int) -> Tensor:
        """The guided model output, [P, F, C, H, W] float32."""
        halves = [self.text] if self.negative is None else [self.negative, self.text]
        if self.clock is not None:
            self.clock.tell(step, self.loop.steps, self._branches(len(halves) == 2))
        output = self.loop.forward(torch.cat([latents] * len(halves)), torch.cat(halves), step)
        return output if self.negative is None else guide(output, self.guidance(self.loop.timesteps[step]))

    def _branches(self, guided: bool) -> Sequence[Branch]:
        halves = (False, True) if guided else (True,)
        return [Branch(prompt=i, guided=half) for half in halves for i in range(len(self.text))]


def guide(output: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: [2 B, ...] with the unconditional half first -> [B, ...]."""
    unconditional, conditional = output.chunk(2)
    return unconditional + scale * (conditional - unconditional)
