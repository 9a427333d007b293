"""Every shipped recipe: short, sourced, run on the miniature in 4 steps, and on each family or refused in words."""

from __future__ import annotations

import json

import pytest
import torch

from probe.errors import MmditError
from recipes import parse, study
from recipes.meaning import needs
from recipes.recipe import Recipe
from recipes.run import execute
from recipes.studio import Studio
from tests.toys import cogvideox, flux, hunyuan, mochi, sd3, wan

FAMILIES = {"CogVideoX": cogvideox, "HunyuanVideo": hunyuan, "Mochi": mochi, "SD3": sd3, "FLUX": flux, "Wan": wan}
CALLS = {
    "FLUX": {"height": 32, "width": 32, "max_sequence_length": 12},
    "Wan": {"height": 32, "width": 32, "num_frames": 5},
    "SD3": {"height": 32, "width": 32, "max_sequence_length": 12},
    "Mochi": {"height": 32, "width": 48, "num_frames": 7, "max_sequence_length": 12},
    "HunyuanVideo": {"height": 32, "width": 32, "num_frames": 5},
}
PLAIN = ("record",)
"""Recipes that change nothing."""

ROTARY = [name for name in parse.names() if "RoPE" in needs(parse.load(name))]
"""Recipes that move positions: the miniature has no rotary ones."""

RUNS = study.RESULTS / "families.json"


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
    plain = studio({**few, "edits": [], "guides": [], "latents": [], "masks": {}}, 0)
    changed = [one for one, latents in made.clips.latents.items() if not torch.equal(latents, plain.clips.latents[one])]
    assert changed


@pytest.mark.parametrize("name", ROTARY)
def test_a_recipe_of_positions_refuses_a_model_without_them(studio, name):
    studio.recipe = name
    with pytest.raises(MmditError, match="RoPE"):
        studio({"sampler.steps": 4}, 0)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, toy in FAMILIES.items():
        toy.pipeline().save_pretrained(folder / name)
    return folder


def outcome(recipe: Recipe, out) -> str:
    """runs, or why not."""
    try:
        execute(recipe, out, quiet=True)
    except MmditError as error:
        return str(error)
    return "runs"


@pytest.mark.parametrize("name", [name for name in parse.names() if name not in PLAIN])
def test_a_recipe_runs_on_a_family_or_says_why_not(models, tmp_path, name, request):
    """What is stored, and stands in the README, is what happens."""
    found = {}
    for family in FAMILIES:
        call = [f"call={json.dumps(CALLS[family])}"] if family in CALLS else []
        recipe = parse.load(name, ["sampler.steps=4", *call], {"model": str(models / family)})
        found[family] = outcome(recipe, tmp_path / family)
    known = json.loads(RUNS.read_text()) if RUNS.is_file() else {}
    if request.config.getoption("--write-families"):
        RUNS.write_text(
            json.dumps(known | {name: {f: said == "runs" for f, said in found.items()}}, indent=1, sort_keys=True)
            + "\n"
        )
        return
    assert {family: said == "runs" for family, said in found.items()} == known.get(name), found
