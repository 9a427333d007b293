"""Searches find heads that were planted, by the measure they name, and say what they compared."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from probe.errors import UsageError
from recipes import hunt
from recipes.cli import main
from recipes.effect import Made
from recipes.hunt import Search
from tests.recipes.line import refused

MEASURE = {"name": "number", "want": "higher", "arguments": {"name": "score"}}
COUNTS = {"layers": 3, "heads": 2}


def planted(overrides, seed):
    """Two good heads and a bad one; every seed has an offset."""
    places = [tuple(place) for place in overrides.get("variables.places", [])]
    gain = {(2, 1): 2.0, (0, 1): 1.0, (1, 0): -1.0}
    return Made({}, {}, numbers={"score": sum(gain.get(place, 0.0) for place in places) + seed})


def planned(**more):
    return Search.model_validate({"recipe": "x", "measure": MEASURE, **more})


def searched():
    plan = planned(keep=2, empty={"guides": []})
    return hunt.search(plan, (0, 2), planted, COUNTS)


def test_the_best_heads_are_chosen_and_the_worst_named():
    found = searched()
    assert found["chosen"] == [[2, 1], [0, 1]]
    assert found["worst"][0] == [1, 0]
    assert len(found["worst"]) == 2
    assert found["empty"] == 1  # the mean offset of the seeds
    assert len(found["rounds"][0]) == 6
    assert [1, 0, 0.0] in found["rounds"][0]


def test_a_measure_that_should_fall_turns_the_search_round():
    plan = planned(measure={**MEASURE, "want": "lower"}, keep=1)
    found = hunt.search(plan, (0, 2), planted, COUNTS)
    assert found["chosen"] == [[1, 0]]
    assert found["worst"] == [[2, 1]]
    assert [2, 1, 3.0] in found["rounds"][0]


def test_later_rounds_add_to_what_was_chosen():
    found = hunt.search(planned(keep=1, rounds=2), (0, 2), planted, COUNTS)
    assert found["chosen"] == [[2, 1], [0, 1]]
    assert [0, 1, 4.0] in found["rounds"][1]
    assert [(row["layer"], row["head"], row["number"]) for row in hunt.rows(found)][:2] == [
        ("2", "1", "3.000"),
        ("0", "1", "4.000"),
    ]


def test_layers_are_searched_as_a_span():
    given = []

    def make(overrides, seed):
        given.append(overrides.get("variables.layers"))
        return planted({}, seed)

    plan = planned(over="layers", variable="layers", keep=1, set={"sampler.steps": 2})
    found = hunt.search(plan, (0,), make, COUNTS)
    assert given == [{"only": [0]}, {"only": [1]}, {"only": [2]}, None]
    assert found["chosen"] == [[0]]
    assert "head" not in hunt.rows(found)[0]


def test_searches_come_by_name_and_others_are_refused(capsys, tmp_path):
    assert hunt.load("headhunter").variable == "places"
    with pytest.raises(ValidationError):
        planned(over="tokens")
    with pytest.raises(UsageError, match="at most all of different candidates"):
        hunt.search(planned(keep=9), (0,), planted, COUNTS)
    assert "A search must be a name or a YAML file. Got nothing." in refused(capsys, ["search", "nothing"], 2)
    (tmp_path / "bad.yaml").write_text("recipe: x\nmeasure: {name: number, want: up}\n")
    assert "measure.want" in refused(capsys, ["search", str(tmp_path / "bad.yaml")], 2)


def test_a_search_runs_on_a_model_and_stores_every_score(toy, tmp_path, capsys):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        f"schema_version: 1\nname: mine\nmodel: {toy}\nprompts: [a red circle moving right]\n"
        "variables: {places: [[0, 0]]}\nsampler: {steps: 1, guidance: 1}\n"
        "edits: [{op: scale, tensor: o, factor: 0, places: '${places}'}]\n"
    )
    plan = tmp_path / "plan.yaml"
    measure = "{name: largest_jump, want: lower, arguments: {of: '0'}}"
    plan.write_text(f"recipe: {recipe}\nkeep: 1\nempty: {{edits: []}}\nmeasure: {measure}\n")
    with pytest.raises(SystemExit) as stopped:
        main(["search", str(plan), "--seeds", "1", "--out", str(tmp_path / "found.json"), "--format", "json"])
    assert not stopped.value.code
    found = json.loads((tmp_path / "found.json").read_text())
    assert json.loads(capsys.readouterr().out) == found
    assert len(found["rounds"][0]) == 6
    scores = {tuple(place): value for *place, value in found["rounds"][0]}
    assert scores[tuple(found["chosen"][0])] == min(scores.values()) < max(scores.values())
