"""The benches print what they measured: never what a table hoped for, and no time is asserted."""

import json

import pytest
import torch

from recipes.benches import timing
from recipes.benches.timing import Method
from tests.recipes.line import main_ok, refused


def measured(capsys, *arguments):
    main_ok(["bench", *arguments, "--size", "tiny", "--rounds", "1", "--format", "json"])
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention(capsys, dtype):
    found = measured(capsys, "attention", "--dtype", dtype)
    by_name = {row["method"]: row for row in found["methods"]}
    assert "200 tokens" in found["size"]
    assert by_name["plain attention"]["ratio"] == 1
    bound = {"float32": 1e-3, "bfloat16": 0.2}[dtype]
    for row in found["methods"]:
        assert row["seconds"] > 0
        assert row["error"] is None or row["error"] < bound, row
        assert row["met"] == (None if row["target"] is None else row["ratio"] <= row["target"])
    assert by_name["words, 6"]["on top of plain"]
    assert not by_name["frame to frame, fused with the output"]["on top of plain"]


def test_record(capsys):
    found = measured(capsys, "record")
    errors = {row["method"]: row["error"] for row in found["methods"]}
    assert errors.pop("plain") is None
    assert 0 < errors.pop("heavy, fused with the output") < 1e-5
    assert set(errors.values()) == {0.0}  # recording never changes a bit


def test_tables_for_people(capsys):
    before = torch.get_num_threads()
    main_ok(["bench", "attention", "--size", "tiny", "--rounds", "1", "--threads", str(before + 1)])
    said = capsys.readouterr().out
    assert f"cpu, {before + 1} threads" in said
    assert torch.get_num_threads() == before
    assert "x plain" in said
    assert "plain attention by" in said


def test_methods_take_turns_and_the_first_round_does_not_count():
    order = []
    methods = [Method("g", name, lambda name=name: order.append(name)) for name in "ab"]
    timed = timing.measure(methods, "cpu", rounds=2)
    assert order == ["a", "b"] * 3 + ["a", "b"]  # a warm round, two that count, one for memory
    assert [one.method.name for one in timed] == ["a", "b"]


def test_extra_memory_is_that_of_one_run():
    hungry = Method("g", "hungry", lambda: torch.ones(2**24).sum())
    (timed,) = timing.measure([hungry], "cpu", rounds=1)
    assert 0.8 * 4 * 2**24 < timed.memory < 2 * 4 * 2**24


def test_a_target_is_met_or_missed():
    quick, slow = (timing.Timed(Method("g", "m", lambda: None, target=0.5), seconds, 0, None) for seconds in (0.4, 0.6))
    assert [one.facts(1.0)["met"] for one in (quick, slow)] == [True, False]
    assert [one.row(1.0)["target"] for one in (quick, slow)] == ["+0.5 met", "+0.5 MISSED"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["bench", "attention", "--size", "huge"], "must be one of tiny, mini, small, medium"),
        (["bench", "record", "--size", "huge"], "must be one of tiny, mini, small, medium"),
        (["bench", "attention", "--size", "tiny", "--device", "cuda"], "torch sees no GPU"),
        (["bench", "attention", "--size", "tiny", "--rounds", "0"], "--rounds"),
    ],
)
def test_a_wrong_request_gets_one_sentence(capsys, arguments, sentence):
    assert sentence in refused(capsys, arguments, 2)


def test_a_story_beside_the_authors_schedule(capsys):
    main_ok(
        ["bench", "ditctrl", "--size", "tiny", "--layers", "3", "--prompts", "2", "--rounds", "1", "--format", "json"]
    )
    found = json.loads(capsys.readouterr().out)["ways"]
    nine, six = ([row for row in found if row["segments"] == count] for count in (4, 3))
    assert [row["way"] for row in nine] == ["2 clips", "pairs", "ours", "pairs+mask", "ours+mask"]
    assert [row["passes"] for row in nine][:3] == [600, 1800, 23 * (2 * (2 * 4 + 6)) + 27 * 24]
    assert len(six) == 5
    for row in found:
        assert row["seconds a step"] > 0
        assert row["difference"] is None or row["difference"] < 1e-4, row
    assert sum(row["difference"] is not None for row in found) == 4
