"""What a run will be, before anything is loaded: sizes, where each edit acts, and what it will cost."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from ditctrl import sharing
from ditctrl.duration import shown
from probe.plan import Handler
from probe.readout.base import Readout
from probe.readout.keep import KeepQK
from probe.readout.word import WordMaps
from probe.site import Where, chosen
from probe.store_record import REGIONS
from probe.store_size import Selection, predicted_bytes
from probe.word import words_of
from recipes.build_area import Branches
from recipes.catalogue import clips_of, interventions, layer_passes, plan_of, readouts
from recipes.job import Job
from recipes.program import Change, Program


def predicted(job: Job) -> dict[str, Any]:
    """Sizes, edits and cost before anything runs: what `--dry-run` prints."""
    counted = [_counted(job, readout) for readout in readouts(job)]
    made, size = interventions(job), job.size
    passes = layer_passes(job, made)
    return {
        "model": job.recipe.model,
        **job.resolved(),
        "prompts": [f"{name}: {text}" for name, text in zip(job.recipe.prompt_names, job.recipe.texts, strict=True)],
        "segments": job.segments.count if job.segments else 1,
        "prompts are shown in": _shown(job) if job.segments else None,
        "windows": len(job.cut.starts) if job.cut else None,
        "latent frames": job.frames,
        "video frames": job.pixel_frames,
        "tokens per segment": f"{job.size.layout.text} text + {job.size.layout.grid} = {job.size.layout.total}",
        "layer passes": sum(passes),
        "layer passes of each step": _runs(passes),
        "layer passes of the pair loop": _against(job, sum(passes)) if job.segments else None,
        **{place: _told(job, change) for place, change in made.edits.items()},
        **_shared(job, made),
        "extra attention for edits": f"{plan_of(job, made.handlers).cost(size.layout):.1%}",
        "extra attention for readouts": f"{plan_of(job, counted).cost(size.layout):.1%}",
        "for example": _example(job, [*made.handlers, *counted]) if made.handlers else None,
        "goes on after an interrupt": f"no: {made.carries} would be lost" if made.carries else None,
        "run folder without the video, at most": f"{predicted_bytes(_selection(job, counted)) / 1e6:.1f} MB",
    }


def _against(job: Job, passes: int) -> str:
    """What DiTCtrl's own schedule would take, and the share of it that is taken."""
    assert job.segments
    reference = sharing.reference_passes(job.segments, job.steps, job.size.layers)
    return f"{reference}, of which this is {passes / reference:.2f}"


def _shown(job: Job) -> list[str]:
    """From when to when each prompt of segments is shown, in seconds, and what was asked for."""
    assert job.segments
    assert job.recipe.segments
    fps, asked = job.recipe.output.fps, job.recipe.segments.durations
    assert job.size.clip
    spans = [[job.size.clip.pixels_before(edge) / fps for edge in span] for span in shown(job.segments)]
    told = [
        f"{name}: {start:.1f} to {stop:.1f} s"
        for name, (start, stop) in zip(job.recipe.prompt_names, spans, strict=True)
    ]
    if asked is None:
        return told
    wanted = [one if job.recipe.segments.unit == "seconds" else one / fps for one in asked]
    return [f"{line} (asked {want:.1f})" for line, want in zip(told, wanted, strict=True)]


def _runs(numbers: Sequence[int]) -> str:
    """Equal numbers in a row together: "4 in steps 0 to 9, 6 in 10 to 19"."""
    groups = [(value, [at for at, _ in same]) for value, same in groupby(enumerate(numbers), key=lambda item: item[1])]
    return ", ".join(
        f"{value} in {at[0]} to {at[-1]}" if len(at) > 1 else f"{value} in {at[0]}" for value, at in groups
    )


def _told(job: Job, change: Change) -> str:
    """What an edit became, where it acts, and its cost."""
    if not change.handlers:
        return "nothing: its window is empty" if job.segments else "nothing: its guide has weight 0"
    cost = plan_of(job, change.handlers).cost(job.size.layout)
    return f"{'; '.join(map(str, change.handlers))}; {_places(job, change)}; {cost:.1%} more attention"


def _places(job: Job, change: Change) -> str:
    where, handler = change.handlers[0].where, change.handlers[0]
    spans = [
        _span("steps", where.steps, job.steps),
        _span("layers", where.layers, job.size.layers),
        _span("heads", where.heads, job.size.heads),
    ]
    rows = getattr(handler, "rows", None)
    return ", ".join([*spans, *_who(job, change.where.branches), f"rows {'all' if rows is None else rows}"])


def _who(job: Job, branches: Any) -> list[str]:
    """Branches as a recipe names them."""
    if not isinstance(branches, Branches):
        return []
    prompts = [job.recipe.prompt_names[number] for number in branches.prompts or ()]
    half = {None: [], True: ["conditional half"], False: ["unconditional half"]}[branches.guided]
    pass_ = [] if branches.role is None else [f"pass {branches.role}"]
    return [*([f"prompts {', '.join(prompts)}"] if prompts else []), *half, *pass_]


def _span(what: str, span: Any, count: int) -> str:
    found = chosen(span, count)
    if len(found) == count:
        return f"all {what}"
    together = found[-1] - found[0] == len(found) - 1
    return (
        f"{what} {found[0]} to {found[-1]}" if together and len(found) > 1 else f"{what} {', '.join(map(str, found))}"
    )


def _shared(job: Job, made: Program) -> dict[str, str]:
    """What is found or kept for the edits."""
    return {f"shared {i}": str(one) for i, one in enumerate(made.shared)}


def _example(job: Job, handlers: Sequence[Handler]) -> str:
    """What happens at the first of the calls that most handlers meet."""
    plan = plan_of(job, handlers)
    meets = [
        (sum(_at(handler.where, job, step, layer) for handler in handlers), -step, -layer)
        for step in range(job.first_step, job.steps)
        for layer in range(job.size.layers)
    ]
    _, step, layer = max(meets)
    return plan.explain(-step, -layer)


def _at(where: Where, job: Job, step: int, layer: int) -> bool:
    return step in chosen(where.steps, job.steps) and layer in chosen(where.layers, job.size.layers)


def _counted(job: Job, readout: Readout) -> Readout:
    """Word maps of every word: no tokenizer yet, so the longest prompt counts."""
    if not isinstance(readout, WordMaps) or readout.words:
        return readout
    widest = max((tuple(dict.fromkeys(words_of(text)))[: readout.most] for text in job.recipe.texts), key=len)
    return WordMaps(*widest, where=readout.where, directions=readout.directions, per_head=readout.per_head)


def _selection(job: Job, counted: Sequence[Readout]) -> Selection:
    """What the run keeps, for the prediction of its size."""
    size, where, record = job.size, job.record_where(), job.recipe.record
    steps = chosen(where.steps, job.steps)
    maps = next((readout for readout in counted if isinstance(readout, WordMaps)), None)
    kept = {readout.stored for readout in counted}
    sites = next((len(readout.sites) for readout in counted if isinstance(readout, KeepQK)), 0)
    clips = sum(_clips(job, step) for step in steps)
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
        text_text="text_text" in kept,
        spatial="spatial" in kept,
        temporal="temporal" in kept,
        region_steps=len(chosen(job.region_where().steps, job.steps)) if set(REGIONS) & kept else 0,
        metrics=sum(len(readout.definitions) for readout in counted),
        qk=sites,
        width=size.width,
        state=_state(job),
        segments=clips / len(steps) if steps else 0,
    )


def _clips(job: Job, step: int) -> int:
    """Clips that a step records: unperturbed conditional ones."""
    if job.segments is None:
        return clips_of(job)
    return len(sharing.branches(job.segments, job.window, step))


def _state(job: Job) -> int:
    """Values of the state to resume from: latents, and x0 as well where the sampler remembers it."""
    count = 1 if job.joined else len(job.recipe.texts)
    if job.size.clip is None:
        return count * job.size.layout.grid.size
    copies = 2 if job.recipe.sampler.scheduler == "dpm" else 1
    return count * copies * job.frames * job.size.clip.latent_values
