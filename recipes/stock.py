"""A recipe on a family without a loop of our own: one prompt through its stock pipeline, recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from probe.recorder import generate
from probe.store import Run
from recipes import parse
from recipes.catalogue import readouts
from recipes.job import Job


def call_of(job: Job) -> dict[str, Any]:
    """The arguments of the pipeline's call; guidance only where the recipe gives a number."""
    sampler = job.recipe.sampler
    given = {} if sampler.guidance == "auto" else {"guidance_scale": job.guidance}
    return {"num_inference_steps": job.steps, **given, **job.recipe.call}


def execute(job: Job, pipe: Any, out: Path, force: bool, quiet: bool) -> Run:
    """Run a recipe through `pipe` into the folder `out`.

    Raises:
        MmditError: with one sentence; finished steps stay readable, and run.json says failed or interrupted.
    """
    recipe = job.recipe
    return generate(
        pipe,
        recipe.prompts[0],
        readouts(job),
        out,
        seed=recipe.sampler.seed,
        fps=recipe.output.fps,
        force=force,
        recipe=parse.dump(recipe),
        quiet=quiet,
        call=call_of(job),
    )
