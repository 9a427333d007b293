"""Run a recipe: model, plan, loop, run folder."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from control.adapter import Loop
from control.denoise import Guided, Prediction, State, denoise
from ditctrl.method import MultiPrompt
from ditctrl.sharing import share_previous
from probe.clock import Clock
from probe.errors import MmditError
from probe.models.load import load
from probe.plan import Handler, Plan
from probe.provenance import provenance
from probe.readout.mass import RegionMass
from probe.readout.word import WordMaps
from probe.recorder import Recorder, finish_video
from probe.site import chosen
from probe.store import Run, RunWriter, refuse_taken
from probe.tracer import Traced, trace
from recipes import parse
from recipes.job import Job, prepare
from recipes.recipe import Recipe


def default_folder(recipe: Recipe) -> Path:
    """runs/<date>-<time>-<name>, with a number if that is taken."""
    stem = f"{datetime.now():%Y%m%d-%H%M%S}-{recipe.name}"
    tries = [Path("runs") / (stem if i == 0 else f"{stem}-{i + 1}") for i in range(1000)]
    return next(path for path in tries if not path.exists())


def readouts(job: Job) -> tuple[WordMaps | None, RegionMass | None]:
    """The readouts a recipe asks for."""
    record, where = job.recipe.record, job.record_where()
    if record is None:
        return None, None
    maps = WordMaps(*record.words, where=where, directions=record.directions, per_head=record.heads == "each")
    return maps, RegionMass(where=where) if record.mass else None


def edits(job: Job) -> list[Handler]:
    """The interventions a recipe asks for."""
    if job.window is None or job.segments is None:
        return []
    return [share_previous(job.segments, job.window, job.recipe.edits[0].tensors)]


def predicted(job: Job) -> dict[str, Any]:
    """Sizes and cost before anything runs: what `--dry-run` prints."""
    maps, mass = readouts(job)
    handlers = [h for h in (*edits(job), maps, mass) if h is not None]
    extra = Plan(handlers, job.steps, job.size.layers).cost(job.size.layout)
    rows = _rows(job)
    return {
        "model": job.recipe.model,
        "steps": job.steps,
        "guidance": job.guidance,
        "segments": job.segments.count if job.segments else 1,
        "latent frames": job.frames,
        "video frames": job.pixel_frames,
        "tokens per segment": f"{job.size.layout.text} text + {job.size.layout.grid} = {job.size.layout.total}",
        "shared steps": _range(job.window.steps) if job.window else "none",
        "shared layers": _range(job.window.layers) if job.window else "none",
        "clip forwards": sum(rows),
        "clip forwards of the pair loop": 4 * (job.segments.count - 1) * job.steps if job.segments else None,
        "extra attention for readouts": f"{extra:.1%}",
        "recorded maps, at most": f"{_map_bytes(job, maps) / 1e6:.1f} MB",
    }


def execute(recipe: Recipe, out: Path, force: bool = False, quiet: bool = False) -> Run:
    """Run a recipe into the folder `out`.

    Raises:
        MmditError: with one sentence; finished steps stay readable, and run.json says failed or interrupted.
    """
    job = prepare(recipe)
    refuse_taken(out, force)
    began = time.perf_counter()
    pipe = load(recipe.model)
    loop = Loop(pipe, job.steps, recipe.sampler.seed, recipe.sampler.scheduler)
    maps, mass = readouts(job)
    traced = trace(pipe, *edits(job), *(h for h in (maps, mass) if h is not None))
    prompts = traced.tokenize(recipe.prompts)
    if maps is not None:
        maps.begin(prompts, 0, 0)  # an unknown word is refused before a folder is made
    info = {**provenance(pipe), "prompts": list(recipe.prompts), "seed": recipe.sampler.seed, "steps": job.steps}
    info["scheduler"] = {"class": type(loop.scheduler).__name__, **_plain(dict(loop.scheduler.config))}
    with RunWriter.create(out, info, parse.dump(recipe), force) as writer, _out_of_memory():
        stride = job.segments.stride if job.segments else 0
        recorder = Recorder(writer, prompts, maps, mass, lambda branch: branch.segment * stride)
        with tqdm(total=job.steps, desc=recipe.name, unit="step", disable=quiet) as bar:
            state = _generate(job, loop, traced, _on_step(loop, traced, recorder, bar))
        finish_video(writer.folder, loop.decode(state.latents)[0], recipe.output.fps, ", then ".join(recipe.prompts))
        loop.close()
        writer.finish("done", seconds=round(time.perf_counter() - began, 1), clip_forwards=sum(_rows(job)))
    return Run(out)


def _generate(job: Job, loop: Loop, traced: Traced, on_step: Callable[[State], None]) -> State:
    text = loop.encode(job.recipe.prompts)
    negative = torch.zeros_like(text[:1]) if job.recipe.sampler.negative == "zeros" else loop.encode([""])

    def predict(clock: Clock) -> Prediction:
        if job.segments is None:
            return Guided(loop, text, negative if job.guidance > 1 else None, job.scale, clock)
        return MultiPrompt(loop, job.segments, text, negative, job.scale, job.window, clock)

    dtype = torch.float32 if job.segments else text.dtype  # the stock loop keeps latents in the text's dtype
    start = State.start(loop, 1, job.frames, dtype)
    return traced.run(lambda clock: denoise(loop, predict(clock), start, on_step), job.recipe.prompts)


def _on_step(loop: Loop, traced: Traced, recorder: Recorder, bar: Any) -> Callable[[State], None]:
    def write(state: State) -> None:
        step = state.step - 1
        assert traced.layout is not None
        attrs = {"timestep": loop.timesteps[step], "sigma": loop.sigma(step)}
        recorder.write(step, traced.layout, attrs, _resume(state, loop))
        bar.update()

    return write


def _resume(state: State, loop: Loop) -> dict[str, Any]:
    kept = {
        "step": state.step,
        "latents": state.latents.float().cpu().numpy(),
        "timestep": loop.timesteps[state.step - 1],
        "generator": state.generator.numpy(),
    }
    if state.previous_x0 is not None:
        kept["previous_x0"] = state.previous_x0.float().cpu().numpy()
    return kept


@contextlib.contextmanager
def _out_of_memory() -> Iterator[None]:
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise MmditError(
            f"The run must fit into the memory of the GPU. Got: {str(error).split('.')[0]}. "
            "Use fewer transition segments, or enable_model_cpu_offload."
        ) from error


def _rows(job: Job) -> list[int]:
    """Clip evaluations of each step, both guidance halves."""
    if job.segments is None:
        return [2 if job.guidance > 1 else 1] * job.steps
    shared = job.window.steps if job.window else range(0)
    count = job.segments.count
    return [2 * (2 * (count - 1) if step in shared else count) for step in range(job.steps)]


def _map_bytes(job: Job, maps: WordMaps | None) -> float:
    if maps is None:
        return 0.0
    where = job.record_where()
    words = len(maps.words) or max(len(text.split()) for text in job.recipe.prompts)
    heads = job.size.heads if maps.per_head else 1
    steps, layers = chosen(where.steps, job.steps), chosen(where.layers, job.size.layers)
    clips = sum(rows // 2 for step, rows in enumerate(_rows(job)) if step in steps)
    return clips * len(layers) * heads * words * len(maps.directions) * job.size.layout.grid.size


def _range(span: range) -> str:
    return f"[{span.start}, {span.stop})"


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    kinds = (str, int, float, bool, type(None))
    return {
        k: v
        for k, v in config.items()
        if isinstance(v, kinds) and not k.startswith("_") and not isinstance(v, np.generic)
    }
