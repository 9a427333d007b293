"""What a run could not do, or would not notice, is refused before it starts: one sentence with its place."""

import re

import numpy as np
import pytest
import torch

from control.sparsify import Sparsify
from probe.errors import RecipeError, UsageError
from probe.models.place import place_of
from recipes.language import include, parse, plan_file, registry
from recipes.language.maskvalues import text_of
from recipes.language.operation import Operation
from tests import tiny
from tests.recipes.line import TWO, main_ok, refused
from tests.recipes.test_build import INSIDE, TAKE, made_of

LONG = "a" * 5000


@pytest.mark.parametrize("given", ["mapping={move: [1, 0, 0]}", "positions=target", "kinds=[joint]"])
def test_what_sharing_with_the_segment_before_does_not_do_is_refused(capsys, toy, given):
    arguments = ["run", "ditctrl", "-m", toy, "--dry-run", "--set", f"edits.0.{given}"]
    key = given.partition("=")[0]
    said = refused(capsys, arguments, 2)
    assert re.search(rf"line \d+: edits.0 must have no {key} with previous_segment. Got", said)


@pytest.mark.parametrize(
    ("edit", "masks", "sentence"),
    [
        ({**TAKE, "mapping": []}, {}, "edits.0 transfer: A mapping must have one source row below 48 .* Got 0. Number"),
        ({**INSIDE, "rows": "none"}, {}, "masks.none: A mask must have a token inside. Got 0 of 48. Draw it again"),
        (
            {**INSIDE, "rows": {"all": [{"frames": [0, 1]}, {"frames": [1, 2]}]}},
            {},
            r"edits.0 scale: An area must have a token of the video. Got \(frames\(0:1\) & frames\(1:2\)\)",
        ),
        (
            {"op": "bias", "amount": 1, "columns": {"not": {"frames": [0, 3]}}},
            {},
            r"edits.0 bias: An area must have a token of the video. Got \(video & ~frames\(0:3\)\)",
        ),
        (
            {**INSIDE, "rows": "cat", "steps": {"first": 2}},
            {"steps": [1, 3]},
            "edits.0 scale: An edit inside of a mask must have a step after 1, the first at which mask cat is looked "
            "for. Got steps 0 to 1",
        ),
        ({**TAKE, "gate": {"not": "cat"}, "steps": 0}, {}, "must have a step after 0, .* mask cat .* Got steps 0 to 0"),
        (
            {**INSIDE, "rows": "cat", "strength": {"from": 1, "to": 0, "stop": 0.5, "shape": "step"}},
            {"steps": [1, 3]},
            "must have a step after 1, .* Got steps 0 to 1",
        ),
    ],
)
def test_an_edit_of_nothing_is_refused(toy, edit, masks, sentence):
    empty = {"values": text_of(np.zeros((1, 4, 4), bool))}
    with pytest.raises(UsageError, match=sentence):
        made_of(toy, [edit], masks={"cat": {"word": "cat", "prompt": "source", **masks}, "none": empty})


def test_an_edit_that_meets_its_mask_late_is_not_refused(toy):
    late = {"from": 0, "to": 1, "start": 0.5, "stop": 0.5}
    cat = {"word": "cat", "prompt": "source", "steps": [1, 3]}
    for more in ({"steps": [1, 3]}, {"strength": late}, {"strength": 0, "steps": 0}):
        made_of(toy, [{**INSIDE, "rows": "cat", **more}], masks={"cat": cat})
    made_of(toy, [{**INSIDE, "rows": {"any": ["cat", "video"]}, "steps": 0}], masks={"cat": cat})


@pytest.mark.parametrize(
    ("stored", "more", "sentence"),
    [
        ({"step": 3}, {"steps": 1}, "stored.step must not lie behind the first step of its edit, 1. Got 3"),
        ({"step": 1}, {}, "stored.step must not lie behind the first step of its edit, 0. Got 1"),
        ({"layer": 2}, {"layers": 1}, "stored.layer must not lie behind the first layer of its edit, 1. Got 2"),
        ({"step": 1, "layer": 2}, {"steps": 1, "layers": 1}, "stored.layer must not lie behind"),
        ({"layer": 2}, {"places": [[1, 0], [2, 0]]}, "stored.layer must not lie behind the first layer"),
    ],
)
def test_what_is_stored_later_is_refused_before_the_run(toy, stored, more, sentence):
    with pytest.raises(UsageError, match=f"edits.0 transfer: {sentence}"):
        made_of(toy, [{**TAKE, "source": {"stored": stored}, **more}])


@pytest.mark.parametrize(
    ("stored", "more"),
    [
        ({"step": 1}, {"steps": [1, 4]}),
        ({"layer": 1}, {"layers": [1, 3]}),
        ({"step": 0, "layer": 2}, {"steps": [1, 4], "layers": 1}),
        ({"step": 2}, {"strength": {"from": 0, "to": 1, "start": 0.5, "stop": 0.5}}),
    ],
)
def test_what_is_stored_in_time_is_not_refused(toy, stored, more):
    made_of(toy, [{**TAKE, "source": {"stored": stored}, **more}])


class Twice(Operation):
    op: str = "twice"


@pytest.mark.parametrize(
    ("built", "got"),
    [
        (lambda: 1 / 0, "ZeroDivisionError: division by zero"),
        (lambda: None, "None"),
        (lambda: ["x"], r"\['x'\]"),
        (lambda: [], r"\[\]"),
        (lambda: "x", "'x'"),
    ],
)
def test_a_package_that_builds_no_handlers_is_named(toy, monkeypatch, built, got):
    made = registry.Operator("twice", Twice, lambda edit, context: built())
    monkeypatch.setattr(registry, "operator_names", lambda: ("twice",))
    monkeypatch.setattr(registry, "operator", lambda name: made)
    monkeypatch.setattr(registry, "origin", lambda name: "lab")
    with pytest.raises(RecipeError, match=f"edits.1 twice: The operator twice of lab must build handlers. Got {got}."):
        made_of(toy, [INSIDE, {"op": "twice"}])


@pytest.mark.parametrize("path", ['"a\\0b"', LONG, "/".join(["a" * 200] * 25)])
def test_a_path_that_no_disk_has_is_refused(capsys, tmp_path, path):
    mine = tmp_path / "mine.yaml"
    mine.write_text(f"include: {path}\n")
    line = refused(capsys, ["recipes", "validate", str(mine)], 2)
    assert "mine.yaml, line 1: a path must be readable. Got" in line
    assert len(line) < 400
    mine.write_text(f"schema_version: 1\nname: x\nprompts: [a cat]\nmasks: {{m: {{file: {path}}}}}\n")
    assert "mine.yaml, line 4: a path must be readable" in refused(capsys, ["recipes", "validate", str(mine)], 2)


@pytest.mark.parametrize("name", ["~nouser/x.yaml", LONG, "a\0b"])
def test_a_name_that_no_disk_has_is_refused(capsys, tmp_path, name):
    line = refused(capsys, ["recipes", "validate", name], 2)
    assert "A recipe must be a YAML file or a built-in name. Got " in line
    assert line.count("a" * 100) == 0
    with pytest.raises(UsageError, match="A part must be a name or a YAML file. Got"):
        plan_file.load(Part, name, tmp_path)


class Part(Operation):
    op: str = "part"


@pytest.mark.parametrize("device", ["tpu", "cpu:x", "meta", "cuda:x", "cpu cuda"])
def test_a_device_must_be_one(capsys, device):
    line = refused(capsys, ["check", "miniature", "--device", device], 2)
    assert f"A device must be cpu, cuda or one GPU of several, cuda:1. Got '{device}'" in line


def test_a_device_must_be_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert place_of() == ("cuda", torch.bfloat16)
    assert place_of("cuda:1", "float32") == ("cuda:1", torch.float32)
    assert place_of("cpu") == ("cpu", torch.float32)
    with pytest.raises(UsageError, match="A device must be there. Got cuda:2, and torch sees 2 GPUs. Take --device"):
        place_of("cuda:2")


def test_a_run_is_found_by_its_own_file(recorded, tmp_path):
    assert include.find(str(recorded / "run.json")) == recorded / "recipe.yaml"
    assert parse.load(str(recorded / "run.json")) == parse.load(str(recorded))
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(RecipeError, match="A run must hold recipe.yaml to be run again. Got .*run.json without one"):
        parse.load(str(tmp_path / "run.json"))


NAMED = "schema_version: 1\nname: mine\nprompts: {source: a red cat, target: a blue dog}\n"


def test_prompts_of_the_command_line_keep_the_names_of_the_recipe(capsys, toy, tmp_path):
    main_ok(["run", "prompt-to-prompt-replace", "-m", toy, *TWO, "--set", "masks={}", "--set", "steps=5", "--dry-run"])
    mine = tmp_path / "mine.yaml"
    mine.write_text(f"{NAMED}edits: [{{op: transfer, source: source, prompts: [target]}}]\n")
    given = parse.load(str(mine), (), {"prompts": [tiny.PROMPT, tiny.OTHER]})
    assert given.prompts == {"source": tiny.PROMPT, "target": tiny.OTHER}
    assert parse.load("record", (), {"prompts": ["a cat"]}).prompts == ["a cat"]
    capsys.readouterr()
    line = refused(capsys, ["run", str(mine), "-m", toy, "-p", "a cat", "--dry-run"], 2)
    assert "mine.yaml, line 3: prompts must be as many as the recipe names, source, target. Got 1. Repeat -p" in line


@pytest.mark.parametrize("name", ["a" * 65, "a" * 300])
def test_a_name_must_fit_the_name_of_a_file(name):
    data = {"schema_version": 1, "name": "x", "prompts": {"a" * 64: "a cat"}}
    assert parse.validate(data, "x").prompt_names == ("a" * 64,)
    with pytest.raises(RecipeError, match="must have at most 64 characters. Got 'a") as refusal:
        parse.validate({**data, "prompts": {name: "a cat"}}, "x")
    assert len(str(refusal.value)) < 300


def test_sparsify_keeps_at_least_one_key():
    weights = torch.tensor([[0.2, 0.5, 0.3], [0.1, 0.1, 0.8]])
    kept = Sparsify(1e-9)._sparse(weights, 1.0)  # pyright: ignore[reportPrivateUsage]
    assert torch.equal(kept, torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]))
