"""Run a recipe: model, plan, loop, run folder. Also goes on with a run that stopped."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from control.adapter import Loop
from control.denoise import Guided, Prediction, State, denoise
from ditctrl.method import MultiPrompt
from probe.clock import Clock
from probe.errors import MmditError
from probe.models.load import load
from probe.provenance import provenance, where_from
from probe.readout.base import Readout
from probe.recorder import Recorder, finish_video
from probe.store import Run, RunWriter, refuse_taken
from probe.tracer import Traced, trace
from probe.word import Prompt
from recipes import parse, resume, stock
from recipes.catalogue import clip_forwards, edits, readouts
from recipes.job import Job, prepare
from recipes.recipe import Recipe


def default_folder(recipe: Recipe) -> Path:
    """runs/<date>-<time>-<name>, with a number if that is taken."""
    stem = f"{datetime.now():%Y%m%d-%H%M%S}-{recipe.name}"
    tries = [Path("runs") / (stem if i == 0 else f"{stem}-{i + 1}") for i in range(1000)]
    return next(path for path in tries if not path.exists())


@dataclass(frozen=True)
class Place:
    """Where a model computes: `device` None is CUDA if there is one; `offload` keeps idle parts on the CPU."""

    device: str | None = None
    offload: bool = False


def execute(recipe: Recipe, out: Path, force: bool = False, quiet: bool = False, place: Place | None = None) -> Run:
    """Run a recipe into the folder `out`.

    Raises:
        MmditError: with one sentence; finished steps stay readable, and run.json says failed or interrupted.
    """
    job = prepare(recipe)
    refuse_taken(out, force)
    if job.size.clip is None:
        with _interrupted(out), _out_of_memory():
            return stock.execute(job, _load(job, place or Place()), out, force, quiet)
    loaded = _open(job, place or Place())
    return _carry_out(loaded, RunWriter.create(out, loaded.info, parse.dump(recipe), force), loaded.start(), quiet)


def go_on(folder: Path, quiet: bool = False, place: Place | None = None) -> Run:
    """Continue a run that was interrupted or failed after its last complete step; the video equals an undisturbed
    run's.

    Raises:
        StoreError: the run is done, or was made by other software, on another device or with another model.
    """
    run = Run(folder)
    loaded = _open(prepare(resume.recipe_of(run)), place or Place())
    state = resume.state_of(run, loaded.info, loaded.start())
    return _carry_out(loaded, RunWriter.reopen(folder), state, quiet)


@dataclass(frozen=True)
class _Loaded:
    """A job with its loaded pipeline and its readouts."""

    job: Job
    loop: Loop
    traced: Traced
    readouts: tuple[Readout, ...]
    prompts: tuple[Prompt, ...]
    text: torch.Tensor
    info: dict[str, Any]
    began: float

    def start(self) -> State:
        """Pure noise; the stock loop keeps latents in the text's dtype, DiTCtrl in float32."""
        dtype = torch.float32 if self.job.segments else self.text.dtype
        return State.start(self.loop, 1, self.job.frames, dtype)

    def predict(self, clock: Clock) -> Prediction:
        """The recipe's prediction of a step."""
        job, text = self.job, self.text
        zeros = job.recipe.sampler.negative == "zeros"
        negative = torch.zeros_like(text[:1]) if zeros else self.loop.encode([""])
        if job.segments is None:
            return Guided(self.loop, text, negative if job.guidance > 1 else None, job.scale, clock)
        return MultiPrompt(self.loop, job.segments, text, negative, job.scale, job.window, clock)


def _load(job: Job, place: Place) -> Any:
    return load(job.recipe.model, device=place.device, offload=place.offload)


def _open(job: Job, place: Place) -> _Loaded:
    began, sampler = time.perf_counter(), job.recipe.sampler
    with _out_of_memory():
        pipe = _load(job, place)
    loop = Loop(pipe, job.steps, sampler.seed, sampler.scheduler)
    looks = readouts(job)
    traced = trace(loop.pipe, *edits(job), *looks)
    prompts = traced.tokenize(job.recipe.prompts)
    traced.plan(job.steps, prompts)  # refuses what cannot work before a folder is made
    return _Loaded(job, loop, traced, looks, prompts, loop.encode(job.recipe.prompts), _info(job, loop), began)


def _info(job: Job, loop: Loop) -> dict[str, Any]:
    """What run.json says of the run, and what a resumed one must find again."""
    scheduler, recipe = loop.scheduler, job.recipe
    return {
        **provenance(loop.pipe),
        "recipe": sha256(parse.dump(recipe).encode()).hexdigest()[:16],
        "prompts": list(recipe.prompts),
        "seed": recipe.sampler.seed,
        **job.resolved(),
        "fps": recipe.output.fps,
        "sampler": {"class": type(scheduler).__name__, **_plain(dict(scheduler.config))},
    }


def _carry_out(loaded: _Loaded, writer: RunWriter, state: State, quiet: bool) -> Run:
    job, loop, recipe = loaded.job, loaded.loop, loaded.job.recipe
    with _interrupted(writer.folder), writer, _out_of_memory():
        stride = job.segments.stride if job.segments else 0
        recorder = Recorder(writer, loaded.prompts, loaded.readouts, lambda branch: branch.segment * stride)
        with tqdm(total=job.steps, initial=state.step, desc=recipe.name, unit="step", disable=quiet) as bar:
            on_step = _on_step(loaded, recorder, bar)
            if state.step < job.steps:
                start = state
                drive = lambda clock: denoise(loop, loaded.predict(clock), start, on_step)  # noqa: E731
                state = loaded.traced.run(drive, recipe.prompts)
        finish_video(writer.folder, loop.decode(state.latents)[0], recipe.output.fps, ", then ".join(recipe.prompts))
        loop.close()
        seconds = round(time.perf_counter() - loaded.began, 1)
        writer.finish("done", seconds=seconds, clip_forwards=sum(clip_forwards(job)))
    return Run(writer.folder)


def _on_step(loaded: _Loaded, recorder: Recorder, bar: Any) -> Callable[[State], None]:
    loop, source = loaded.loop, where_from(loaded.info)

    def write(state: State) -> None:
        step = state.step - 1
        attrs = {"timestep": loop.timesteps[step], "sigma": loop.sigma(step), **source}
        recorder.write(step, attrs, resume.kept_of(state, loop.timesteps[step]))
        bar.update()

    return write


@contextlib.contextmanager
def _interrupted(folder: Path) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        steps = len(Run(folder).steps)
        raise MmditError(
            f"The run must finish to give a video. Got an interrupt: {steps} finished steps stay readable in "
            f"{folder}. Go on with: mmdit resume {folder}"
        ) from None


@contextlib.contextmanager
def _out_of_memory() -> Iterator[None]:
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise MmditError(
            f"The run must fit into the memory of the GPU. Got: {str(error).split('.')[0]}. Try --offload, or fewer "
            "prompts or transition segments."
        ) from error


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    kinds = (str, int, float, bool, type(None))
    return {
        k: v
        for k, v in config.items()
        if isinstance(v, kinds) and not k.startswith("_") and not isinstance(v, np.generic)
    }
