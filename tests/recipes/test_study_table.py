"""What the README and the recipes say of themselves is what is stored."""

from __future__ import annotations

from pathlib import Path

import pytest

from recipes import study, study_store
from recipes.language import parse
from recipes.study_table import markdown

README = Path(__file__).parents[2] / "README.md"
FOUND = study_store.stored(study_store.RESULTS)


def test_the_table_of_the_readme_is_made_of_the_stored_results():
    """Write it with `mmdit study table`."""
    block = README.read_text(encoding="utf-8").split("<!-- recipes -->\n")[1].split("\n<!-- /recipes -->")[0]
    assert block == markdown(study_store.RESULTS)


@pytest.mark.parametrize("name", parse.names())
def test_a_recipe_is_checked_where_its_study_was_shown(name):
    status, told = parse.load(name).status, FOUND.get(name)
    assert (status == "checked") == (told is not None and study.verdict(told) == "shown")


@pytest.mark.parametrize("name", FOUND)
def test_a_stored_result_is_of_the_study_as_it_stands(name):
    plan, told = study.load(name), FOUND[name]
    assert told["claim"] == plan.claim
    assert told["recipe"] == plan.recipe
    assert [
        {key: one[key] for key in measure.model_dump()}
        for one, measure in zip(told["measures"], plan.measures, strict=True)
    ] == [measure.model_dump() for measure in plan.measures]
    assert len(told["seeds"]) >= 20


@pytest.mark.parametrize("name", study.names())
def test_a_study_is_of_a_recipe_that_is_there(name):
    plan = study.load(name)
    assert plan.recipe in parse.names()
    assert plan.measures
