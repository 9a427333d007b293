"""A recipe with its loaded model: everything between its numbers and a run. Nothing is written here."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from control.adapter import Loop
from control.denoise import Lockstep, Prediction, State, denoise
from control.invert import Follow, Trajectory
from control.latent import LatentEdit
from control.noise import renew
from control.overlap import Windows
from ditctrl.method import MultiPrompt
from probe.clock import Clock
from probe.errors import MmditError
from probe.film import Frames
from probe.provenance import provenance
from probe.readout.base import Readout
from probe.show import MAIN, Clip
from probe.tracer import Traced, trace
from probe.word import Prompt
from recipes.catalogue import readouts
from recipes.inverted import inverted, reconstruction, refuse_skipped
from recipes.job import Job
from recipes.program import Program
from recipes.told import told


@dataclass(frozen=True)
class Loaded:
    """A job with its program, its loaded pipeline and its readouts."""

    job: Job
    made: Program
    loop: Loop
    traced: Traced
    readouts: tuple[Readout, ...]
    prompts: tuple[Prompt, ...]
    text: torch.Tensor
    began: float

    @cached_property
    def info(self) -> dict[str, Any]:
        """What run.json says of the run, and what a resumed one must find again."""
        scheduler = self.loop.scheduler
        return {
            **provenance(self.loop.pipe),
            **told(self.job),
            **self.job.resolved(),
            "sampler": {"class": type(scheduler).__name__, **_plain(dict(scheduler.config))},
        }

    @cached_property
    def inverted(self) -> Trajectory | None:
        """The way of a given video to the first step, in float32; None without one."""
        video = self.job.recipe.video
        if video is None or self.job.given is None:
            return None
        return inverted(self.loop, self.job.given, self._told, video.iterations)

    def reconstruction(self) -> dict[str, Any]:
        """For run.json: how near inversion comes to a given video."""
        if self.job.given is None or self.inverted is None:
            return {}
        return {"reconstruction": reconstruction(self.loop, self.job.given, self._told, self.inverted)}

    @property
    def _told(self) -> torch.Tensor:
        """The text [1, T, E] of the prompt that tells a given video."""
        prompt = self.job.given.prompt if self.job.given else 0
        return self.text[prompt : prompt + 1]

    def start(self) -> State:
        """Pure noise, or the noise of a given video for all prompts; the stock loop keeps latents in the text's dtype,
        DiTCtrl and videos in float32.
        """
        job, way = self.job, self.inverted
        if way is not None:
            latents = way.at(way.start).expand(len(self.text), -1, -1, -1, -1)
            return State(way.start, latents, None, self.loop.generator.get_state())
        dtype = torch.float32 if job.segments else self.text.dtype
        if job.connected is None:
            return State.start(self.loop, 1 if job.joined else len(self.text), job.frames, dtype)
        state, places = State.start(self.loop, 1, job.connected.frames, dtype), job.connected
        clips = [state.latents[:, places.window(places.own(prompt))] for prompt in range(places.prompts)]
        return replace(state, latents=torch.cat(clips, 1))

    def predict(self, clock: Clock) -> Prediction:
        """The recipe's prediction of a step."""
        job, text = self.job, self.text
        zeros = job.recipe.sampler.negative == "zeros"
        negative = torch.zeros_like(text[:1]) if zeros else self.loop.encode([""])
        if job.segments is not None:
            return MultiPrompt(self.loop, job.segments, text, negative, job.scale, job.window, clock, job.chunks)
        cut = job.cut
        text = text if cut is None else text[list(cut.prompts)]
        halves = negative.expand_as(text) if job.guidance > 1 else None
        clips = Lockstep(self.loop, text, halves, job.scale, clock, self.made.guides, cut.shown if cut else ())
        return clips if cut is None else Windows(clips, cut.starts, cut.length, cut.weights)

    def drive(self, clock: Clock, state: State, on_step: Callable[[State], None]) -> State:
        """The loop from a state to the last step, repeated where the recipe says so."""
        predict, again, noise = self.predict(clock), self.made.again, state
        edits = (*self._follow(), *self.made.latents)

        def denoised(start: State) -> State:
            return denoise(self.loop, predict, start, on_step, edits, self.prompts)

        state = denoised(state)
        for _ in range(again.times if again else 0):
            assert again is not None
            state = denoised(renew(self.loop, noise, state, again.low_pass, again.step))
        return state

    def _follow(self) -> tuple[LatentEdit, ...]:
        """What keeps the prompt of a given video on its way."""
        given, video = self.job.given, self.job.recipe.video
        if given is None or video is None or self.inverted is None or not video.follow:
            return ()
        return (Follow(self.inverted, given.prompt),)

    def clips(self, state: State) -> list[Clip]:
        """The videos, decoded one by one."""
        return [Clip(name, text, self.decode(latents)) for name, text, latents in self.parts(state)]

    def decode(self, latents: torch.Tensor) -> Frames:
        """Pixel frames of a video [1, F, C, H, W]; isolated clips are decoded one by one."""
        clips = latents.split(self.job.size.clip.frames, 1) if self.job.connected and self.job.size.clip else [latents]
        return np.concatenate([self.loop.decode(clip)[0] for clip in clips])

    def parts(self, state: State) -> list[tuple[str, str, torch.Tensor]]:
        """Name, text and latents [1, F, C, H, W] of each video."""
        recipe = self.job.recipe
        if self.job.joined:
            return [(MAIN, ", then ".join(recipe.texts), state.latents)]
        return list(zip(recipe.prompt_names, recipe.texts, state.latents.split(1), strict=True))


def opened(job: Job, made: Program, load: Callable[[], Any]) -> Loaded:
    """A job on the pipeline that `load` gives; its plan is made, so that what cannot work is refused now.

    Raises:
        MmditError: the model cannot be loaded, an edit does not fit it, or it does not fit into memory.
    """
    began, sampler, texts = time.perf_counter(), job.recipe.sampler, job.recipe.texts
    with out_of_memory():
        pipe = load()
    loop = Loop(pipe, job.steps, sampler.seed, sampler.scheduler, sampler.noise)
    looks = readouts(job)
    traced = trace(loop.pipe, *made.handlers, *looks)
    prompts = traced.tokenize(texts)
    refuse_skipped(traced.handlers, job.first_step, job.steps)
    traced.plan(job.steps, prompts)  # refuses what cannot work before a folder is made
    return Loaded(job, made, loop, traced, looks, prompts, loop.encode(texts), began)


@contextlib.contextmanager
def out_of_memory() -> Iterator[None]:
    """One sentence where the memory of the GPU is too small."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise MmditError(
            f"The run must fit into the memory of the GPU. Got: {str(error).split('.')[0]}. Try --offload, "
            "--segments-per-batch 1 in a story, or fewer prompts."
        ) from error


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    kinds = (str, int, float, bool, type(None))
    return {
        k: v
        for k, v in config.items()
        if isinstance(v, kinds) and not k.startswith("_") and not isinstance(v, np.generic)
    }
