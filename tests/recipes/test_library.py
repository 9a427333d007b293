"""Every shipped recipe: short, sourced, and run on the miniature in 4 steps."""

from __future__ import annotations

import pytest
import torch

from probe.errors import MmditError
from recipes.language import parse
from recipes.language.meaning import needs
from recipes.studio import Studio

ROTARY = [name for name in parse.names() if "RoPE" in needs(parse.load(name))]
"""Recipes that move positions: the miniature has no rotary ones."""


def lines(name: str) -> int:
    return len(parse.text_of(parse.find(name)).rstrip().splitlines())


@pytest.mark.parametrize("name", parse.names())
def test_a_recipe_is_short_and_says_where_it_comes_from(name):
    recipe = parse.load(name)
    assert recipe.name == name
    assert recipe.description
    assert lines(name) <= 45
    assert recipe.source
    assert recipe.status != "primitives only" or recipe.departures
    assert recipe.status != "checked" or recipe.checked


@pytest.mark.parametrize("name", parse.names())
def test_a_recipe_survives_its_own_text(name, tmp_path):
    recipe = parse.load(name)
    file = tmp_path / "again.yaml"
    file.write_text(parse.dump(recipe), encoding="utf-8")
    assert parse.load(str(file)) == recipe


@pytest.fixture(scope="module")
def studio():
    return Studio("record")


@pytest.mark.parametrize("name", [name for name in parse.names() if name not in ROTARY])
def test_a_recipe_runs_on_the_miniature_and_does_something(studio, name):
    """Four steps: the edits of a recipe change its latents; one that only looks tells numbers."""
    studio.recipe, few, recipe = name, {"sampler.steps": 4}, parse.load(name)
    made = studio(few, 0)
    assert all(torch.isfinite(latents).all() for latents in made.clips.latents.values())
    if not (recipe.edits or recipe.guides or recipe.latents):
        assert made.numbers or recipe.segments or recipe.windows
        return
    plain = studio({**few, "edits": [], "guides": [], "latents": []}, 0)
    changed = [one for one, latents in made.clips.latents.items() if not torch.equal(latents, plain.clips.latents[one])]
    assert changed


@pytest.mark.parametrize("name", ROTARY)
def test_a_recipe_of_positions_refuses_a_model_without_them(studio, name):
    studio.recipe = name
    with pytest.raises(MmditError, match="RoPE"):
        studio({"sampler.steps": 4}, 0)
