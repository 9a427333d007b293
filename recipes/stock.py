"""A recipe on a family without a loop of our own: its prompts as one batch through the stock pipeline, recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from probe.recorder import generate
from probe.store import Run
from recipes.catalogue import readouts
from recipes.job import Job
from recipes.program import Program
from recipes.told import show, told


def call_of(job: Job) -> dict[str, Any]:
    """The arguments of the pipeline's call; guidance only where the recipe gives a number."""
    sampler = job.recipe.sampler
    given = {} if sampler.guidance == "auto" else {"guidance_scale": job.guidance}
    return {"num_inference_steps": job.steps, **given, **job.recipe.call}


def execute(job: Job, made: Program, pipe: Any, out: Path, force: bool, quiet: bool) -> Run:
    """Run a recipe through `pipe` into the folder `out`.

    Raises:
        MmditError: with one sentence; finished steps stay readable, and run.json says failed or interrupted.
    """
    recipe, info = job.recipe, told(job)
    return generate(
        pipe,
        dict(zip(recipe.prompt_names, recipe.texts, strict=True)),
        readouts(job),
        out,
        edits=made.handlers,
        seed=recipe.sampler.seed,
        shared=recipe.sampler.noise == "shared",
        force=force,
        recipe=info["recipe_text"],
        info=info,
        show=show(job),
        quiet=quiet,
        call=call_of(job),
    )
