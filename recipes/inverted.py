"""The way of a given video to the first step of a run, and how well it comes back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from tqdm import tqdm

from control.adapter import Loop
from control.invert import Trajectory, encode, invert, plain, sampled
from probe.errors import PlanError
from probe.plan import Handler
from probe.site import chosen
from recipes.effect import Made, psnr
from recipes.given import Given


def inverted(loop: Loop, given: Given, text: Tensor, iterations: int) -> Trajectory:
    """The latents of a video from the first step of the run on, under its prompt, text [1, T, E]."""
    count = loop.steps - given.step
    with tqdm(total=count, desc="inversion", unit="step", leave=False, disable=None) as bar:
        video, predict = encode(loop, given.frames), plain(loop, text)
        return invert(loop, predict, video, given.step, iterations, on_step=lambda _: bar.update())


def reconstruction(loop: Loop, given: Given, text: Tensor, trajectory: Trajectory) -> dict[str, Any]:
    """How near two ways back come to the video's pixels, PSNR in dB, 50 at most: the autoencoder alone, and inversion
    followed by the sampler without edits at guidance 1. `forwards` of one clip were made to invert it.
    """
    latents = {
        "autoencoder": trajectory.latents[-1:],
        "inversion": sampled(loop, plain(loop, text), trajectory),
    }
    clips = {name: loop.decode(one)[0] for name, one in latents.items()} | {"given": given.frames}
    near = {name: round(psnr(Made(clips, {}), name, "given"), 2) for name in latents}
    return {**near, "forwards": trajectory.forwards}


def refuse_skipped(handlers: Sequence[Handler], first: int, steps: int, place: str = "") -> None:
    """Nothing, if each has a step of those that a run from a video makes, `first` to the last. `place` is where in the
    recipe they come from.

    Raises:
        PlanError: one has none, and would meet nothing.
    """
    for handler in handlers:
        if max(chosen(handler.where.steps, steps), default=first) < first:
            raise PlanError(
                f"{place and f'{place}: '}What acts or looks must have a step that the run makes, {first} to "
                f"{steps - 1} of this video. Got {handler}, which has none. Give it later steps, or lower video.start."
            )
