"""A recipe as the folder of its run holds it. No torch."""

from __future__ import annotations

from recipes.language import parse
from recipes.language.recipe import Recipe


def text_of(recipe: Recipe) -> str:
    """A recipe in a run folder, beside a copy of the video that it edits."""
    if recipe.video is not None:
        held = recipe.video.model_copy(update={"file": recipe.video.beside})
        recipe = recipe.model_copy(update={"video": held})
    return parse.dump(recipe)
