"""From a job to the handlers of its plan, and what they will cost."""

from __future__ import annotations

from typing import Any

from ditctrl import sharing
from probe.plan import Handler, Plan
from probe.readout.base import Readout
from probe.readout.mass import RegionMass
from probe.readout.word import WordMaps
from probe.site import chosen
from probe.word import words_of
from recipes.job import Job


def readouts(job: Job) -> tuple[Readout, ...]:
    """The readouts a recipe asks for."""
    record, where = job.recipe.record, job.record_where()
    if record is None:
        return ()
    maps = WordMaps(*record.words, where=where, directions=record.directions, per_head=record.heads == "each")
    return (maps, RegionMass(where=where)) if record.mass else (maps,)


def edits(job: Job) -> list[Handler]:
    """The interventions a recipe asks for."""
    if job.window is None or job.segments is None:
        return []
    return [sharing.share_previous(job.segments, job.window, job.recipe.edits[0].tensors)]


def predicted(job: Job) -> dict[str, Any]:
    """Sizes and cost before anything runs: what `--dry-run` prints."""
    looks = [_counted(job, readout) for readout in readouts(job)]
    maps = next((readout for readout in looks if isinstance(readout, WordMaps)), None)
    extra = Plan([*edits(job), *looks], job.steps, job.size.layers).cost(job.size.layout)
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
        "recorded maps, at most": f"{_map_bytes(job, maps) / 1e6:.1f} MB",
        "states to resume from": f"{_state_bytes(job) / 1e6:.1f} MB",
    }


def _counted(job: Job, readout: Readout) -> Readout:
    """Word maps of every word: no tokenizer yet, so the longest prompt counts."""
    if not isinstance(readout, WordMaps) or readout.words:
        return readout
    widest = max((tuple(dict.fromkeys(words_of(text))) for text in job.recipe.prompts), key=len)
    return WordMaps(*widest, where=readout.where, directions=readout.directions, per_head=readout.per_head)


def clip_forwards(job: Job) -> list[int]:
    """Clip evaluations of each step, both guidance halves."""
    if job.segments is None:
        return [2 if job.guidance > 1 else 1] * job.steps
    return sharing.clip_forwards(job.segments, job.window, job.steps)


def _map_bytes(job: Job, maps: WordMaps | None) -> float:
    if maps is None:
        return 0.0
    where = job.record_where()
    heads = job.size.heads if maps.per_head else 1
    steps, layers = chosen(where.steps, job.steps), chosen(where.layers, job.size.layers)
    halves = 2 if job.guidance > 1 else 1
    clips = sum(rows // halves for step, rows in enumerate(clip_forwards(job)) if step in steps)
    return clips * len(layers) * heads * len(maps.words) * len(maps.directions) * job.size.layout.grid.size


def _state_bytes(job: Job) -> int:
    """Latents of every step in float32, and x0 as well where the sampler remembers it."""
    copies = 2 if job.recipe.sampler.scheduler == "dpm" else 1
    return copies * 4 * job.steps * job.frames * job.size.latent_values
