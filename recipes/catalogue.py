"""From a job to the handlers of its plan, and the branches they will see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from control.guide import passes
from ditctrl import sharing
from probe.plan import Handler, Plan
from probe.readout.base import Readout
from probe.site import ROLES, Branch
from recipes import looks
from recipes.context import Context
from recipes.inverted import refuse_skipped
from recipes.job import Job
from recipes.program import Program, check, program


def readouts(job: Job) -> tuple[Readout, ...]:
    """The readouts a recipe asks for."""
    record, size = job.recipe.record, job.size
    if record is None:
        return ()
    regions = looks.region_maps(record, job.region_where(), job.region_frame(), size.family.kinds)
    return (*looks.readouts(record, job.record_where(), job.steps, size.layers, size.family.kinds), *regions)


def interventions(job: Job) -> Program:
    """What a recipe changes, fresh for one run.

    Raises:
        UsageError: an edit does not fit the model or the run, or clashes with another; names it.
    """
    size = job.size
    made = program(
        Context(
            job.recipe,
            job.steps,
            size.layers,
            size.heads,
            size.layout,
            size.rope,
            job.segments,
            job.window,
            job.chunks,
        )
    )
    for place, change in made.edits.items():
        refuse_skipped(change.handlers, job.first_step, job.steps, place)
    runs = [_at_step(job, made, step) for step in range(job.steps)]
    check(made, lambda handlers: plan_of(job, handlers), runs, size.heads)
    return made


def plan_of(job: Job, handlers: Sequence[Handler]) -> Plan:
    """The plan as far as the configuration of the model tells."""
    return Plan(handlers, job.steps, job.size.layers, kinds=job.size.family.kinds, heads=job.size.heads)


def branches(job: Job, made: Program) -> tuple[Branch, ...]:
    """Every branch that the run evaluates in some step."""
    return tuple(dict.fromkeys(branch for step in range(job.steps) for branch in _at_step(job, made, step)))


def _at_step(job: Job, made: Program, step: int) -> list[Branch]:
    """The branches of a step, both halves of guidance. A stock pipeline may have both whatever its guidance."""
    found = _conditional(job, made, step)
    if job.guidance <= 1 and job.segments is None and job.size.clip is not None:
        return found
    plain = [branch for branch in found if branch.role in ROLES]
    return [*(replace(branch, guided=False) for branch in plain), *found]


def _conditional(job: Job, made: Program, step: int) -> list[Branch]:
    """The conditional branches of a step, perturbed passes among them; none before the first that is made."""
    if step < job.first_step:
        return []
    if job.segments is not None:
        return sharing.branches(job.segments, job.window, step)
    plain = job.cut.shown if job.cut else tuple(Branch(prompt=i) for i in range(len(job.recipe.texts)))
    return [*plain, *(replace(plain[row], role=role) for role, row in passes(made.guides, plain, step, job.steps))]


def layer_passes(job: Job, made: Program) -> list[int]:
    """Evaluations of one layer for one clip in each step, both guidance halves and perturbed passes."""
    layers = job.size.layers
    if job.segments is not None:
        return sharing.layer_passes(job.segments, job.window, job.steps, layers, job.chunks)
    return [_times(made, step) * layers * len(_at_step(job, made, step)) for step in range(job.steps)]


def clips_of(job: Job) -> int:
    """Clips of one half of guidance: prompts, or windows."""
    return len(job.cut.starts) if job.cut else len(job.recipe.texts)


def _times(made: Program, step: int) -> int:
    """How often a step is evaluated."""
    return 1 + (made.again.times if made.again and step >= made.again.step else 0)
