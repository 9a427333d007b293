"""Studies: intervals, paired differences, and a verdict that can come out either way."""

from __future__ import annotations

import json

import numpy as np
import pytest
from pydantic import ValidationError

from probe.errors import UsageError
from recipes import study, study_store
from recipes.effect import Made
from recipes.study import Study
from tests.recipes.line import refused

MEASURE = {"name": "number", "want": "higher", "arguments": {"name": "score"}}
ARMS = {"recipe": {"gain": 1.0}, "empty": {"gain": 0.0}, "wrong": {"gain": 0.2}}


def planted(effect: float, noise: float, want: str = "higher") -> dict:
    """A study of a maker whose score is `effect` x gain plus noise of the seed."""
    plan = Study(
        recipe="x",
        claim="it lifts the score",
        measures=[{**MEASURE, "want": want}],
        arms={name: ARMS[name] for name in ("empty", "wrong")},
    )

    def make(overrides, seed):
        rng = np.random.default_rng([seed, round(10 * overrides["gain"])])
        return Made({}, {}, numbers={"score": effect * overrides["gain"] + noise * rng.normal()})

    return study.carry_out(plan, range(20), make, ARMS)


def test_a_planted_effect_is_found_and_none_is_not():
    assert study.shown(planted(1.0, 0.1))
    assert not study.shown(planted(0.0, 0.1))
    assert not study.shown(planted(1.0, 10.0))
    assert not study.shown(planted(-1.0, 0.1))
    assert study.shown(planted(-1.0, 0.1, "lower"))


def test_differences_are_paired_by_seed():
    """A spread between seeds that is far larger than the effect does not hide it."""
    plan = Study(recipe="x", claim="c", measures=[MEASURE], arms={"empty": {}, "wrong": {}})
    offsets = np.random.default_rng(0).normal(0, 100, 20)

    def make(overrides, seed):
        return Made({}, {}, numbers={"score": offsets[seed] + overrides["gain"]})

    result = study.carry_out(plan, range(20), make, ARMS)
    assert result["measures"][0]["difference to"]["empty"]["mean"] == pytest.approx(1)
    assert study.shown(result)


def test_two_measures_of_one_kind_are_kept_apart_and_beat_the_arms_they_are_against():
    """The second number is best in the empty arm, which only the first one has to beat."""
    measures = [
        MEASURE,
        {"name": "number", "want": "lower", "arguments": {"name": "loss"}, "against": ["wrong"]},
    ]
    plan = Study(recipe="x", claim="c", measures=measures, arms={"empty": {}, "wrong": {}})

    def make(overrides, seed):
        loss = {1.0: 2.0, 0.0: 0.0, 0.2: 5.0}[overrides["gain"]]
        return Made({}, {}, numbers={"score": overrides["gain"] + 0.01 * seed, "loss": loss})

    result = study.carry_out(plan, range(3), make, ARMS)
    score, loss = result["measures"]
    assert score["arms"]["recipe"]["values"] == [1.0, 1.01, 1.02]
    assert (loss["arms"]["empty"]["mean"], loss["difference to"].keys()) == (0.0, {"wrong"})
    assert study.shown(result)
    assert [row["measure"] for row in study.rows({"x": result})] == ["number score", "number loss"]
    measures[1]["against"] = ["wrong", "empty"]
    plan = Study(recipe="x", claim="c", measures=measures, arms={"empty": {}, "wrong": {}})
    assert not study.shown(study.carry_out(plan, range(3), make, ARMS))
    with pytest.raises(ValidationError, match="against its own arms. Got other; they are empty, wrong"):
        Study(recipe="x", claim="c", measures=[{**MEASURE, "against": ["other"]}], arms={"empty": {}, "wrong": {}})


def test_the_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(1)
    held = [study.interval(rng.normal(3, 1, 20)) for _ in range(200)]
    assert 0.88 < np.mean([one.low <= 3 <= one.high for one in held]) <= 0.99


def test_a_constant_has_an_interval_of_no_width_and_nonsense_is_refused():
    assert study.interval([2.0, 2.0, 2.0]) == study.Interval(2.0, 2.0, 2.0)
    for bad in ([1.0], [1.0, float("nan")]):
        with pytest.raises(UsageError, match="two finite values"):
            study.interval(bad)


def test_a_claim_needs_its_controls():
    with pytest.raises(ValidationError, match="arms empty and wrong"):
        Study(recipe="x", claim="c", measures=[MEASURE], arms={"empty": {}})
    assert Study(recipe="x", claim="c", measures=[MEASURE], scan={"layer": "layers"}).arms == {}


def test_results_are_stored_and_read_back(tmp_path):
    result = planted(1.0, 0.1)
    study_store.write(tmp_path, "x", result)
    assert study_store.stored(tmp_path)["x"] == json.loads(json.dumps(result))
    (row,) = study.rows(study_store.stored(tmp_path))
    assert (row["study"], row["measure"], row["seeds"]) == ("x", "number score", "20")
    assert row["recipe"].startswith("1.0") or row["recipe"].startswith("0.9")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UsageError, match="must be JSON"):
        study_store.stored(tmp_path)


def test_an_interrupted_study_goes_on_and_finds_the_same(tmp_path):
    whole, asked = planted(1.0, 0.5), []
    plan = Study(recipe="x", claim="it lifts the score", measures=[MEASURE], arms={"empty": {}, "wrong": {}})

    def make(overrides, seed):
        asked.append(seed)
        if len(asked) == 8:
            raise KeyboardInterrupt
        rng = np.random.default_rng([seed, round(10 * overrides["gain"])])
        return Made({}, {}, numbers={"score": overrides["gain"] + 0.5 * rng.normal()})

    with pytest.raises(KeyboardInterrupt):
        study.carry_out(plan, range(20), make, ARMS, study_store.Done.at(tmp_path, "x", "key"))
    assert study_store.stored(tmp_path) == {}
    done = study_store.Done.at(tmp_path, "x", "key")
    assert list(done.values) == ["0", "1"]
    assert study.carry_out(plan, range(20), make, ARMS, done) == whole
    assert asked[8:11] == [2, 2, 2]
    assert study_store.Done.at(tmp_path, "x", "another recipe").values == {}
    done.forget()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("measures: [{name: object_iuo, want: higher}]", "A measure must be one of"),
        ("measures: [{name: psnr, want: higher, arguments: {of: target}}]", "must get its own arguments"),
        ("arms: {empty: {}, wrong: {edits.3.layers: 0}}", "edits"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_a_clip_is_made(tmp_path, capsys, monkeypatch, change, said):
    monkeypatch.setattr("recipes.studio.load", lambda *a, **k: 1 / 0)
    lines = {
        "arms": "arms: {empty: {edits: []}, wrong: {}}",
        "measures": "measures: [{name: psnr, want: higher, arguments: {of: target, to: source}}]",
    }
    lines[change.split(":")[0]] = change
    file = tmp_path / "mine.yaml"
    file.write_text("\n".join(["recipe: masactrl", "claim: it does", *lines.values()]))
    assert said in refused(capsys, ["study", "run", str(file), "--results", str(tmp_path / "found")], 2)
    assert not (tmp_path / "found").exists()
