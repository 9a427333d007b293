"""What the files of a run say of the recipe they were made from."""

from __future__ import annotations

from dataclasses import asdict
from hashlib import sha256
from typing import Any

from ditctrl.sharing import reference_passes
from probe.show import Show
from recipes.job import Job
from recipes.language.folder import text_of


def told(job: Job) -> dict[str, Any]:
    """For run.json: the whole recipe as it ran, its fingerprint, and what readers look for."""
    recipe, text = job.recipe, text_of(job.recipe)
    several = {"names": list(recipe.prompt_names), "shown": list(_shown(job))} if _several(job) else {}
    return {
        "recipe": sha256(text.encode()).hexdigest()[:16],
        "recipe_text": text,
        "prompts": list(recipe.texts),
        **several,
        "seed": recipe.sampler.seed,
        "fps": recipe.output.fps,
        **(_of_story(job) if job.segments else {}),
    }


def _of_story(job: Job) -> dict[str, Any]:
    """How its segments were spread over forwards, what DiTCtrl's own schedule would take, and what a token frame of its
    maps is in latent frames.
    """
    clip, grid = job.size.clip, job.size.layout.grid
    assert clip
    assert job.segments
    return {
        "chunks": asdict(job.chunks),
        "pair_loop_passes": None if job.connected else reference_passes(job.segments, job.steps, job.size.layers),
        "latent_frames_per_token": -(-clip.frames // grid.frames),
        "padding_frames": clip.padding,
    }


def show(job: Job) -> Show:
    """For the videos: the recipe lies in every one of them."""
    recipe, several = job.recipe, _several(job)
    title = recipe.name if several else ", then ".join(recipe.texts)
    return Show(recipe.output.fps, _shown(job) if several else (), title, text_of(recipe))


def _several(job: Job) -> bool:
    """Whether each prompt has a video of its own."""
    return not job.joined and len(job.recipe.texts) > 1


def _shown(job: Job) -> tuple[str, ...]:
    return tuple(job.recipe.prompt_names[number] for number in job.recipe.shown)
