"""From a job to the handlers of its plan, and what they will cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ditctrl import sharing
from probe.plan import Handler, Plan
from probe.readout.base import Readout
from probe.readout.keep import KeepQK
from probe.readout.word import WordMaps
from probe.site import chosen
from probe.store_size import Selection, predicted_bytes
from probe.word import words_of
from recipes import looks
from recipes.job import Job


def readouts(job: Job) -> tuple[Readout, ...]:
    """The readouts a recipe asks for."""
    record, size = job.recipe.record, job.size
    if record is None:
        return ()
    return looks.readouts(record, job.record_where(), job.steps, size.layers, size.family.kinds)


def edits(job: Job) -> list[Handler]:
    """The interventions a recipe asks for."""
    if job.window is None or job.segments is None:
        return []
    return [sharing.share_previous(job.segments, job.window, job.recipe.edits[0].tensors)]


def predicted(job: Job) -> dict[str, Any]:
    """Sizes and cost before anything runs: what `--dry-run` prints."""
    counted = [_counted(job, readout) for readout in readouts(job)]
    size = job.size
    extra = Plan([*edits(job), *counted], job.steps, size.layers, kinds=size.family.kinds).cost(size.layout)
    return {
        "model": job.recipe.model,
        **job.resolved(),
        "segments": job.segments.count if job.segments else 1,
        "latent frames": job.frames,
        "video frames": job.pixel_frames,
        "tokens per segment": f"{job.size.layout.text} text + {job.size.layout.grid} = {job.size.layout.total}",
        "clip forwards": sum(clip_forwards(job)),
        "clip forwards of the pair loop": 4 * (job.segments.count - 1) * job.steps if job.segments else None,
        "extra attention for readouts": f"{extra:.1%}",
        "run folder without the video, at most": f"{predicted_bytes(_selection(job, counted)) / 1e6:.1f} MB",
    }


def _counted(job: Job, readout: Readout) -> Readout:
    """Word maps of every word: no tokenizer yet, so the longest prompt counts."""
    if not isinstance(readout, WordMaps) or readout.words:
        return readout
    widest = max((tuple(dict.fromkeys(words_of(text)))[: readout.most] for text in job.recipe.prompts), key=len)
    return WordMaps(*widest, where=readout.where, directions=readout.directions, per_head=readout.per_head)


def clip_forwards(job: Job) -> list[int]:
    """Clip evaluations of each step, both guidance halves."""
    if job.segments is None:
        return [2 if job.guidance > 1 else 1] * job.steps
    return sharing.clip_forwards(job.segments, job.window, job.steps)


def _selection(job: Job, counted: Sequence[Readout]) -> Selection:
    """What the run keeps, for the prediction of its size."""
    size, where, record = job.size, job.record_where(), job.recipe.record
    steps = chosen(where.steps, job.steps)
    maps = next((readout for readout in counted if isinstance(readout, WordMaps)), None)
    kept = {readout.stored for readout in counted}
    sites = next((len(readout.sites) for readout in counted if isinstance(readout, KeepQK)), 0)
    halves = 2 if job.guidance > 1 else 1
    clips = sum(rows // halves for step, rows in enumerate(clip_forwards(job)) if step in steps)
    return Selection(
        steps=len(steps) if record else 0,
        layers=len(chosen(where.layers, size.layers)),
        heads=size.heads,
        grid=size.layout.grid.shape,
        text=size.layout.text,
        words=len(maps.words) if maps else 0,
        map_heads=size.heads if maps and maps.per_head else 1,
        directions=len(maps.directions) if maps else 0,
        mass="mass" in kept,
        word_frames=maps is not None,
        frames="frames" in kept,
        columns="columns" in kept,
        token_mass="token_mass" in kept,
        metrics=sum(len(readout.definitions) for readout in counted),
        qk=sites,
        width=size.width,
        state=_state(job),
        segments=clips / len(steps) if steps else 0,
    )


def _state(job: Job) -> int:
    """Values of the state to resume from: latents, and x0 as well where the sampler remembers it."""
    if job.size.clip is None:
        return job.size.layout.grid.size
    copies = 2 if job.recipe.sampler.scheduler == "dpm" else 1
    return copies * job.frames * job.size.clip.latent_values
