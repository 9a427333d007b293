"""The only denoising loop of our own: a state that can be saved and resumed, advanced by a prediction.

Without edits it is bit-identical to the stock CogVideoX pipeline.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from control.adapter import Loop
from control.guide import Guide, passes
from control.latent import LatentEdit, Moment
from probe.clock import Clock
from probe.errors import UsageError
from probe.site import Branch
from probe.word import Prompt

Prediction = Callable[[Tensor, int], Tensor]
"""(latents [P, F, C, H, W], step) -> the guided model output for them, float32."""


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
        """Pure noise from the loop's seed, the same for every prompt or another for each, as the loop says."""
        latents = loop.noise(batch, frames, dtype)
        return cls(0, latents, None, loop.generator.get_state())


@torch.no_grad()
def denoise(
    loop: Loop,
    predict: Prediction,
    state: State,
    on_step: Callable[[State], None] | None = None,
    edits: Sequence[LatentEdit] = (),
    prompts: Sequence[Prompt] = (),
) -> State:
    """Advance `state` to the last step. `on_step` sees each new state.

    `predict` tells the clock step, number of steps and branches before each forward. `edits` change the latents before
    and after each step, in their order, and are told `prompts`; what they make is part of the state.
    """
    loop.generator.set_state(state.generator)
    for step in range(state.step, loop.steps):
        at, latents = Moment(loop, step, tuple(prompts)), state.latents
        for edit in edits:
            latents = edit.before(latents, at)
        output = predict(latents, step)
        latents, x0 = loop.advance(output, latents, state.previous_x0, step)
        for edit in edits:
            latents = edit.after(latents, at)
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
class Lockstep:
    """Clips denoised side by side in one batch: [unconditional.., conditional.., perturbed..], each with one entry per
    prompt. Edits can take from one prompt what another needs at the same step and layer.

    `text` and `negative` are [P, T, E]; `guidance(timestep)` the scale of a step. A scale of at most 1 at every step
    needs `negative=None`, which leaves the unconditional half out. Without `guides` this is classifier-free guidance of
    independent clips, bit-identical to the stock pipeline's batch.

    `shown` says what the entries of one half show where these are not the prompts in their order: windows of a long
    video, or several clips of one prompt.

    Raises:
        UsageError: `shown` or `negative` are not as many as `text`, or a guide asks for steps or prompts that there are
            not.
    """

    loop: Loop
    text: Tensor
    negative: Tensor | None
    guidance: Callable[[int], float]
    clock: Clock | None = None
    guides: tuple[Guide, ...] = ()
    shown: tuple[Branch, ...] = ()

    def __post_init__(self) -> None:
        given = [part for part in (self.negative, self.shown or None) if part is not None]
        if any(len(part) != len(self.text) for part in given):
            raise UsageError(
                f"Clips in lockstep must have as many negatives and branches as texts. Got {[len(p) for p in given]} "
                f"for {len(self.text)}. Give one for each."
            )
        self.clip_forwards()

    def __call__(self, latents: Tensor, step: int) -> Tensor:
        """The guided model output, [P, F, C, H, W] float32."""
        halves = [self.text] if self.negative is None else [self.negative, self.text]
        weights = self._passes(step)
        rows = [row for _, row in weights]
        if self.clock is not None:
            self.clock.tell(step, self.loop.steps, self.branches(step))
        batch = torch.cat([*[latents] * len(halves), latents[rows]])
        output = self.loop.forward(batch, torch.cat([*halves, self.text[rows]]), step)
        plain, perturbed = output[: len(output) - len(rows)], output[len(output) - len(rows) :]
        guided = plain if self.negative is None else guide(plain, self.guidance(self.loop.timesteps[step]))
        if not rows:
            return guided
        conditional, guided = plain[-len(self.text) :], guided.clone()
        for row, weight, output in zip(rows, weights.values(), perturbed, strict=True):
            guided[row] += weight * (conditional[row] - output)
        return guided

    def branches(self, step: int) -> list[Branch]:
        """The batch of a step, in order."""
        shown = self._shown()
        unconditional = [] if self.negative is None else [replace(branch, guided=False) for branch in shown]
        return [*unconditional, *shown, *(replace(shown[row], role=role) for role, row in self._passes(step))]

    def clip_forwards(self) -> list[int]:
        """Transformer evaluations of single clips in each step, both guidance halves and perturbed passes."""
        return [len(self.branches(step)) for step in range(self.loop.steps)]

    def _shown(self) -> tuple[Branch, ...]:
        return self.shown or tuple(Branch(prompt=i) for i in range(len(self.text)))

    def _passes(self, step: int) -> dict[tuple[str, int], float]:
        return passes(self.guides, self._shown(), step, self.loop.steps)


def guide(output: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: [2 B, ...] with the unconditional half first -> [B, ...]."""
    unconditional, conditional = output.chunk(2)
    return unconditional + scale * (conditional - unconditional)
