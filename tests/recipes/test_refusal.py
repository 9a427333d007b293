"""One clear sentence for everything that can go wrong."""

import errno
import json
import os
import shutil
import sys

import pytest

import probe
from probe.store import Run
from recipes.cli import main
from tests import tiny
from tests.recipes.line import TWO, refused, story


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["run", "ditctrll"], 2, "Did you mean ditctrl?"),
        (["run", "ditctrl", "--set", "sampler.stpes=5"], 2, "Got sampler.stpes. Did you mean steps?"),
        (["run", "ditctrl", "--set", "sampler.steps=many"], 2, "sampler.steps must be"),
        (["run", "ditctrl", "--set", "steps"], 2, "must be key=value"),
        (["run", "ditctrl", "--set", "edits.4.steps=[1, 2]"], 2, "must be chosen by its number"),
        (["run", "ditctrl", "--set", "steps=0"], 2, "sampler.steps must be"),
        (["run", "ditctrl", "--set", "steps=30"], 2, "must divide 1000, or the scheduler misses"),
        (["run", "ditctrl", "--set", "seed=-1"], 2, "sampler.seed must be"),
        (["run", "ditctrl", "--set", "seed=9223372036854775808"], 2, "sampler.seed must be"),
        (["run", "ditctrl", "--set", "overlap=3"], 2, "shorter than a segment of 3"),
        (["run", "ditctrl", "--set", "record.words=[zebra]"], 2, "Got 'zebra'. The words are: a, red, cat"),
        (["run", "ditctrl", "--set", "record.layers=[0, 9]"], 2, "must lie within [0, 3)"),
        (["run", "ditctrl", "-p", "only one"], 2, "at least two prompts"),
        (["run", "ditctrl", "-p", "a cat", "-p", "  "], 2, "prompts.1 must have at least one word"),
        (["record", ""], 2, "prompts.0 must have at least one word"),
        (["record", tiny.PROMPT, "--words", "dog"], 2, "Got 'dog'. The words are: a, red, cat"),
        (["run", "ditctrl", "--set", "guidance=.inf"], 2, "sampler.guidance must be"),
        (["run", "ditctrl", "--set", "name=../evil"], 2, "name must be"),
        (["run", "ditctrl", "--dry-run", "--set", "steps=30"], 2, "must divide 1000"),
        (["run", "ditctrl", "--dry-run", "--set", "record.words=[zebra]"], 2, "Got 'zebra'"),
        (["run"], 2, "Missing argument"),
        (["run", "ditctrl", "--stesp", "5"], 2, "No such option"),
        (["run", "ditctrl", "--format", "xml"], 2, "'xml' is not one of"),
        (["run", "ditctrl", "--set", "show=[nobody]"], 2, "output.show.0 must name a prompt. Got 'nobody'"),
        (["run", "ditctrl", "--set", "stpes=5"], 2, "Got stpes. Did you mean steps?"),
    ],
)
def test_a_wrong_request_gets_one_sentence(capsys, toy, tmp_path, arguments, code, sentence):
    out = tmp_path / "run"
    two = TWO if arguments[:2] == ["run", "ditctrl"] and "-p" not in arguments else []
    rest = [*two, "-m", toy, "--out", str(out)] if arguments != ["run"] else []
    assert sentence in refused(capsys, [*arguments, *rest], code)
    assert not out.exists()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: [1", "mine.yaml, line 1: a recipe must be readable YAML"),
        ("- 1", "must be a mapping"),
        ("schema_version: 1\nname: x\nprompts: [a]\nedits:\n- op: bais", "mine.yaml, line 5: edits.0.op must name"),
        ("name: x\nprompts: [a]", "schema_version must be given"),
        ("schema_version: 2\nname: x\nprompts: [a]", "schema_version must be"),
        ("schema_version: 1\nname: x\nprompts: [a]\nrecord: {word: [a]}", "Got record.word. Did you mean words?"),
        ("schema_version: 1\nname: x\nprompts: []", "prompts must be"),
    ],
)
def test_a_wrong_recipe_gets_one_sentence(capsys, tmp_path, text, sentence):
    (tmp_path / "mine.yaml").write_text(text)
    assert sentence in refused(capsys, ["recipes", "validate", str(tmp_path / "mine.yaml")], 2)


def test_a_folder_is_never_overwritten_without_force(capsys, toy, recorded, tmp_path):
    before = (recorded / "run.json").read_bytes()
    assert "--force" in refused(capsys, story(toy, recorded), 1)
    assert (recorded / "run.json").read_bytes() == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    assert "Nothing was deleted" in refused(capsys, [*story(toy, tmp_path / "mine"), "--force"], 1)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"


def test_a_taken_folder_is_refused_before_the_model_is_loaded(capsys, toy, recorded, monkeypatch):
    monkeypatch.setattr("recipes.run.load", lambda *a, **k: 1 / 0)
    assert "--force" in refused(capsys, story(toy, recorded), 1)


def test_a_folder_that_cannot_be_made(capsys, toy, tmp_path):
    (tmp_path / "file").write_text("")
    assert "is a file" in refused(capsys, story(toy, tmp_path / "file" / "run"), 1)


def test_no_space_left_keeps_the_finished_steps(capsys, toy, tmp_path, monkeypatch):
    from probe import folder

    real, written = folder.os.fsync, []

    def full(descriptor):
        if "step_0002" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(descriptor)
        return real(descriptor)

    monkeypatch.setattr(folder.os, "fsync", full)
    line = refused(capsys, story(toy, tmp_path / "run"), 1)
    assert "No space left on device" in line
    run = Run(tmp_path / "run")
    assert run.steps == (0, 1)
    assert run.status == "failed"
    assert run.word_map("cat", step=1).shape == (3, 4, 4)
    assert not list((tmp_path / "run").rglob("*.tmp"))


@pytest.mark.parametrize("model", ["./nowhere", "no/such/folder", "nowhere"])
def test_a_missing_model(capsys, tmp_path, model):
    line = refused(capsys, ["run", "ditctrl", "-m", model, "--out", str(tmp_path / "run")], 1)
    assert f"Got {model}" in line


def test_an_unreachable_hub_id(capsys, tmp_path):
    assert "Got nobody/nothing" in refused(capsys, ["check", "nobody/nothing"], 1)


def test_a_corrupted_checkpoint(capsys, toy, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(toy, broken)
    weights = broken / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    for arguments in (story(str(broken), tmp_path / "run"), ["check", str(broken)]):
        assert "must load with diffusers" in refused(capsys, arguments, 1)
    assert not (tmp_path / "run").exists()


def test_an_unknown_family(capsys, toy, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(toy, other)
    index = json.loads((other / "model_index.json").read_text())
    index["transformer"][1] = "LatteTransformer3DModel"
    (other / "model_index.json").write_text(json.dumps(index))
    line = refused(capsys, story(str(other), tmp_path / "run"), 1)
    assert "Got LatteTransformer3DModel" in line
    assert "Known: CogVideoX (CogVideoXTransformer3DModel)" in line


def test_an_unexpected_error_is_a_sentence_and_debug_shows_it(capsys, toy, tmp_path, monkeypatch):
    from recipes import run

    monkeypatch.setattr(run, "finish_video", lambda *a: 1 / 0)
    arguments = story(toy, tmp_path / "run")
    assert "Got ZeroDivisionError" in refused(capsys, arguments, 1)
    assert Run(tmp_path / "run").status == "failed"
    with pytest.raises(ZeroDivisionError):
        main([*arguments, "--force", "--debug"])


def test_without_the_model_libraries(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "probe.models.prove", None)
    monkeypatch.delitem(sys.modules, "recipes.checkup", raising=False)
    assert "Got no probe.models.prove. Run: pip install" in refused(capsys, ["check", toy], 1)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        ({"generator": 1}, "must set generator"),
        ({"output_type": "pil"}, "Got output_type"),
        ({"callback_on_step_end": print}, "Got callback_on_step_end"),
        ({"fps": 0}, "fps must be at least 1"),
        ({"steps": 9, "num_inference_steps": 2}, "must lie in 0 to 1"),
        ({"words": ["zebra"]}, "Got 'zebra'"),
    ],
)
def test_probe_record_refuses_before_it_starts(tmp_path, call, sentence):
    with pytest.raises(probe.MmditError, match=sentence):
        probe.record(tiny.pipeline(), tiny.PROMPT, out=tmp_path / "run", **call)
    assert not (tmp_path / "run").exists()
