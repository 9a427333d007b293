"""Run a recipe: model, plan, loop, run folder. Also goes on with a run that stopped."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

from control.denoise import State
from ditctrl.sharing import Chunks
from probe.errors import MmditError, StoreError, UsageError
from probe.folder import save_file
from probe.models.load import load
from probe.provenance import where_from
from probe.recorder import Recorder, refuse_overflow
from probe.show import finish_video
from probe.store import Run, RunWriter, refuse_taken
from recipes import kept, resume, stock
from recipes.catalogue import interventions, layer_passes
from recipes.job import Job, prepare
from recipes.language.recipe import Recipe
from recipes.loaded import Loaded, opened, out_of_memory
from recipes.program import Program
from recipes.told import show


def default_folder(recipe: Recipe) -> Path:
    """runs/<date>-<time>-<name>, with a number if that is taken."""
    stem = f"{datetime.now():%Y%m%d-%H%M%S}-{recipe.name}"
    tries = [Path("runs") / (stem if i == 0 else f"{stem}-{i + 1}") for i in range(1000)]
    return next(path for path in tries if not path.exists())


@dataclass(frozen=True)
class Place:
    """Where a model computes: `device` None is CUDA if there is one; `offload` keeps idle parts on the CPU. `pipe` is
    the recipe's model, loaded before; None loads it. `chunks` says how the segments of a story are spread over
    forwards.
    """

    device: str | None = None
    offload: bool = False
    pipe: Any = None
    chunks: Chunks = field(default_factory=Chunks)


def placed(device: str | None, offload: bool, segments: int | None = None, neighbours: str = "keep") -> Place:
    """A place as the command line says it.

    Raises:
        UsageError: an unknown way to treat neighbours.
    """
    if neighbours not in ("keep", "offload", "recompute"):
        raise UsageError(f"--neighbours must be keep, offload or recompute. Got {neighbours!r}. Choose one.")
    if neighbours != "keep" and segments is None:
        raise UsageError(
            f"--neighbours must come with --segments-per-batch: one batch has no neighbours. Got {neighbours} without. "
            "Add --segments-per-batch 2."
        )
    lent_on = "cpu" if neighbours == "offload" else None
    return Place(device, offload, chunks=Chunks(segments, lent_on, neighbours == "recompute"))


def execute(recipe: Recipe, out: Path, force: bool = False, quiet: bool = False, place: Place | None = None) -> Run:
    """Run a recipe into the folder `out`.

    Raises:
        MmditError: with one sentence; finished steps stay readable, and run.json says failed or interrupted.
    """
    place = place or Place()
    job = prepare(recipe, place.chunks)
    made = interventions(job)
    refuse_taken(out, force)
    if job.size.clip is None:
        with _interrupted(out, "Start the recipe again.", _started(out)), out_of_memory():
            run = stock.execute(job, made, _load(job, place), out, force, quiet)
            kept.write(made, out)
            return run
    loaded = opened(job, made, lambda: _load(job, place))
    with out_of_memory():
        start, told = (
            loaded.start(),
            loaded.info | loaded.reconstruction(),
        )  # a video is inverted before a folder is made
    writer = RunWriter.create(out, told, told["recipe_text"], force)
    if job.given is not None and recipe.video is not None:
        save_file(out / recipe.video.beside, job.given.data)
    return _carry_out(loaded, writer, start, quiet)


def go_on(folder: Path, quiet: bool = False, place: Place | None = None) -> Run:
    """Continue a run that was interrupted or failed after its last complete step; the video equals an undisturbed
    run's.

    Raises:
        StoreError: the run is done, its recipe was refused, it keeps more than its latents from step to step, or it
            was made by other software, on another device or with another model.
    """
    run = Run(folder)
    place = place or Place()
    again = resume.recipe_of(run)
    job = prepare(again, resume.chunks_of(run) if place.chunks == Chunks() else place.chunks)
    made = interventions(job)
    resume.refuse_carried(run, made.carries)
    loaded = opened(job, made, lambda: _load(job, place))
    state = resume.state_of(run, loaded.info, loaded.start())
    return _carry_out(loaded, RunWriter.reopen(folder), state, quiet)


def _load(job: Job, place: Place) -> Any:
    if place.pipe is not None:
        return place.pipe
    return load(job.recipe.model, device=place.device, offload=place.offload)


def _carry_out(loaded: Loaded, writer: RunWriter, state: State, quiet: bool) -> Run:
    job, loop, recipe, began = loaded.job, loaded.loop, loaded.job.recipe, state.step
    with _interrupted(writer.folder, _advice(loaded.made, writer.folder)), writer, out_of_memory():
        recorder = Recorder(writer, loaded.prompts, loaded.readouts, job.start_frame if job.joined else None)
        with tqdm(total=job.steps, initial=state.step, desc=recipe.name, unit="step", disable=quiet) as bar:
            on_step = _on_step(loaded, recorder, bar)
            if state.step < job.steps:
                state = _denoised(loaded, writer, state, on_step)
        finish_video(writer.folder, loaded.clips(state), show(job))
        kept.write(loaded.made, writer.folder)
        loop.close()
        seconds = round(time.perf_counter() - loaded.began, 1)
        before = sum(layer_passes(job, loaded.made)[job.first_step : began])  # of a run that goes on
        traced = loaded.traced
        writer.finish("done", seconds=seconds, layer_passes=before + traced.passes, computed=dict(traced.computed))
    return Run(writer.folder)


def _denoised(loaded: Loaded, writer: RunWriter, start: State, on_step: Callable[[State], None]) -> State:
    """The state after the last step; run.json says of a recipe that was refused that it was."""
    try:
        return loaded.traced.run(lambda clock: loaded.drive(clock, start, on_step), loaded.job.recipe.texts)
    except UsageError as error:
        with contextlib.suppress(StoreError):  # the first error is the one to hear about
            writer.finish("failed", str(error), refused=True)
        raise


def _advice(made: Program, folder: Path) -> str:
    """What to do after an interrupt."""
    if made.carries:
        return f"Start the recipe again: a run with {made.carries} cannot go on."
    return f"Go on with: mmdit resume {folder}"


def _on_step(loaded: Loaded, recorder: Recorder, bar: Any) -> Callable[[State], None]:
    loop, source = loaded.loop, where_from(loaded.info)

    def write(state: State) -> None:
        step = state.step - 1
        refuse_overflow(state.latents, state.step - 1, loop.steps)
        attrs = {"timestep": loop.timesteps[step], "sigma": loop.sigma(step), **source}
        recorder.write(step, attrs, resume.kept_of(state, loop.timesteps[step]))
        bar.update()

    return write


@contextlib.contextmanager
def _interrupted(folder: Path, advice: str, before: str | None = None) -> Iterator[None]:
    """One sentence for Ctrl-C; nothing of this run is in the folder while it holds the one that began at `before`."""
    try:
        yield
    except KeyboardInterrupt:
        if _started(folder) == before:
            raise
        steps = len(Run(folder).steps)
        raise MmditError(
            f"The run must finish to give a video. Got an interrupt: {steps} finished steps stay readable in "
            f"{folder}. {advice}"
        ) from None


def _started(folder: Path) -> str | None:
    """When the run in a folder began, None where there is none."""
    with contextlib.suppress(StoreError):
        return Run(folder).info.get("started")
    return None
