"""Every shipped recipe on every family: what the README's table says is what happens."""

from __future__ import annotations

import json

import pytest

from recipes.language import parse
from recipes.study_table import FAMILIES, RUNS
from tests.recipes.families import CALLS, outcome, pipeline

pytestmark = [
    pytest.mark.filterwarnings("ignore:In CPU autocast"),  # Mochi's own, on every CPU
    pytest.mark.filterwarnings("ignore:Token indices sequence"),
]

SEEN = json.loads(FAMILIES.read_text(encoding="utf-8"))


@pytest.fixture(scope="module", params=CALLS)
def family(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, folder, pipeline(request.param, folder)


@pytest.mark.parametrize("name", parse.names())
def test_a_recipe_runs_where_the_table_says_so_and_is_refused_elsewhere(family, name):
    """Made by `python -m tests.recipes.families`."""
    assert outcome(name, *family) == SEEN[name][family[0]]


def test_a_recipe_that_is_refused_says_why():
    for name, families in SEEN.items():
        for family, ended in families.items():
            assert ended in (RUNS, "changes nothing") or ". Got " in ended, f"{name} on {family}: {ended}"


def test_only_bands_of_frames_change_nothing_of_a_picture():
    still = {(name, family) for name, ends in SEEN.items() for family, end in ends.items() if end == "changes nothing"}
    assert still == {("sparse-videogen", "sd3"), ("sparse-videogen", "flux")}
