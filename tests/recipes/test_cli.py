"""The command line: the happy path on a toy, and one clear sentence for everything that can go wrong."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import yaml

import probe
from probe.store import Run
from recipes import heatmap, resume
from recipes.cli import main
from tests import tiny

FAST = ["--set", "steps=5", "--set", "guidance=3"]
TWO = ["-p", tiny.PROMPT, "-p", tiny.OTHER]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A toy pipeline on disk."""
    folder = tmp_path_factory.mktemp("models") / "toy"
    tiny.pipeline().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def recorded(toy, tmp_path_factory):
    """A finished DiTCtrl run."""
    folder = tmp_path_factory.mktemp("runs") / "story"
    main_ok(["run", "ditctrl", "-m", toy, *TWO, *FAST, "--out", str(folder)])
    return folder


def main_ok(arguments):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert not stopped.value.code


def refused(capsys, arguments, code):
    """Exit code, one line on stderr, nothing like a traceback."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    said = capsys.readouterr().err
    assert stopped.value.code == code, said
    line = said.strip().splitlines()[-1]
    assert line.startswith("mmdit: ")
    assert "Traceback" not in said
    return line


def test_a_story_leaves_a_whole_run_folder(recorded):
    run = Run(recorded)
    assert run.status == "done"
    assert run.steps == (0, 1, 2, 3, 4)
    assert {p.name for p in recorded.iterdir()} == {
        "run.json", "recipe.yaml", "video.mp4", "video.gif", "contact.png", "steps"
    }  # fmt: skip
    assert run.segments == ((0, "plain"), (0, "source"), (1, "plain"), (1, "source"), (1, "target"), (2, "plain"),
                            (2, "source"), (2, "target"), (3, "plain"), (3, "target"))  # fmt: skip
    assert run.word_map("cat").shape == (3, 4, 4)
    assert run.word_map("dog", segment=3, step=0, layer=1, direction="tv").shape == (3, 4, 4)
    assert np.allclose(run.mass(step=2, segment=0).sum(-1), 1, atol=1e-5)
    step, resume = run.resume()
    assert step == 4
    assert resume["latents"].shape == (1, 6, 4, 8, 8)  # 3 + 3 strides of round(3 - 9 * 3 / 13)
    assert {"previous_x0", "generator", "timestep"} <= set(resume)
    assert run.info["prompts"] == [tiny.PROMPT, tiny.OTHER]
    assert run.info["sampler"]["class"] == "CogVideoXDPMScheduler"
    assert run.info["versions"]["torch"]


def test_the_recipe_in_the_folder_makes_the_same_video(recorded, tmp_path):
    main_ok(["run", str(recorded / "recipe.yaml"), "--out", str(tmp_path / "again")])
    assert np.array_equal(Run(recorded).resume()[1]["latents"], Run(tmp_path / "again").resume()[1]["latents"])
    assert (recorded / "video.gif").read_bytes() == (tmp_path / "again" / "video.gif").read_bytes()


def test_record(toy, tmp_path, capsys):
    out = str(tmp_path / "run")
    main_ok(["record", tiny.PROMPT, "--words", "cat, red", "-m", toy, *FAST, "--out", out, "--format", "json"])
    assert json.loads(capsys.readouterr().out)["words"] == ["cat", "red"]
    run = Run(out)
    assert run.word_map("cat", head=1).shape == (3, 4, 4)
    stock = tiny.latents(tiny.pipeline(), steps=5)
    assert np.array_equal(run.resume()[1]["latents"], stock.numpy())


def test_dry_run_writes_nothing(toy, tmp_path, capsys):
    out = tmp_path / "run"
    main_ok(["run", "ditctrl", "-m", toy, *TWO, *FAST, "--out", str(out), "--dry-run", "--format", "json"])
    facts = json.loads(capsys.readouterr().out)
    assert not out.exists()
    assert facts["segments"] == 4
    assert facts["video frames"] == 21
    assert facts["shared steps"] == "[0, 2)"
    assert facts["states to resume from"] == f"{2 * 4 * 5 * 6 * 4 * 8 * 8 / 1e6:.1f} MB"
    assert facts["shared layers"] == "[2, 3)"
    assert facts["clip forwards"] == 2 * 2 * 6 + 3 * 2 * 4


def test_predicted_clip_forwards_are_those_made(recorded):
    assert Run(recorded).info["clip_forwards"] == 2 * 2 * 6 + 3 * 2 * 4


def test_maps(recorded, tmp_path, capsys):
    main_ok(["maps", str(recorded), "--format", "json"])
    assert json.loads(capsys.readouterr().out)["words"] == [
        "a",
        "red",
        "cat",
        "runs",
        "left",
        "blue",
        "dog",
        "sits",
        "on",
        "snow",
    ]
    main_ok(["maps", str(recorded), "--word", "dog", "--format", "json"])
    assert json.loads(capsys.readouterr().out)["shape"] == "6x4x4"
    for kind in ("npz", "csv", "gif", "mp4", "png"):
        path = tmp_path / f"dog.{kind}"
        main_ok(["maps", str(recorded), "--word", "dog", "--export", kind, "--out", str(path)])
        assert path.stat().st_size > 100
    lift = stitched(Run(recorded), "dog", {2: 2, 3: 3})
    assert np.allclose(np.load(tmp_path / "dog.npz")["lift"], lift)
    table = np.loadtxt(tmp_path / "dog.csv", delimiter=",", skiprows=1)
    assert np.allclose(table[:, 3].reshape(6, 4, 4), lift)


def stitched(run, word, starts):
    """Frame by frame, the mean of the segments that show the word."""
    parts = {start: run.word_map(word, segment=segment) for segment, start in starts.items()}
    frames = [[part[f - start] for start, part in parts.items() if 0 <= f - start < 3] for f in range(6)]
    return np.array([np.mean(found, 0) if found else np.zeros((4, 4)) for found in frames])


def test_check_is_green_on_a_sound_model_and_red_on_a_broken_one(toy, tmp_path, capsys):
    main_ok(["check", toy, "--format", "json"])
    assert all(finding["passed"] for finding in json.loads(capsys.readouterr().out))
    pipe = tiny.pipeline()
    pipe.transformer.transformer_blocks[0].attn1.to_out[0].weight.data.zero_()
    pipe.save_pretrained(tmp_path / "broken")
    assert "no change from layer 0" in refused(capsys, ["check", str(tmp_path / "broken")], 1)


def test_recipes(capsys, tmp_path):
    main_ok(["recipes", "list", "--format", "json"])
    assert [r["name"] for r in json.loads(capsys.readouterr().out)] == ["ditctrl", "record"]
    main_ok(["recipes", "show", "record"])
    shown = capsys.readouterr().out
    (tmp_path / "mine.yaml").write_text(shown)
    main_ok(["recipes", "validate", str(tmp_path / "mine.yaml")])
    assert "is a valid recipe" in capsys.readouterr().out
    main_ok(["recipes", "schema"])
    assert json.loads(capsys.readouterr().out)["properties"]["schema_version"]["const"] == 1


def test_doctor(capsys):
    main_ok(["doctor", "--format", "json"])
    facts = json.loads(capsys.readouterr().out)
    assert "error against float64" in facts["attention kernel"]
    assert facts["miniature"] == "there"


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
        (["run", "record", "--set", "prompts=[a cat, a dog]"], 2, "must have one prompt without segments"),
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
        ("a: [1", "must be readable YAML"),
        ("- 1", "must be a mapping"),
        ("name: x\nprompts: [a]", "schema_version must be given"),
        ("schema_version: 2\nname: x\nprompts: [a]", "schema_version must be"),
        ("schema_version: 1\nname: x\nprompts: [a]\nrecord: {word: [a]}", "Got record.word. Did you mean words?"),
        ("schema_version: 1\nname: x\nprompts: []", "prompts must be"),
    ],
)
def test_a_wrong_recipe_gets_one_sentence(capsys, tmp_path, text, sentence):
    (tmp_path / "mine.yaml").write_text(text)
    assert sentence in refused(capsys, ["recipes", "validate", str(tmp_path / "mine.yaml")], 2)


def story(toy, out):
    return ["run", "ditctrl", "-m", toy, *TWO, *FAST, "--out", str(out)]


def test_a_folder_is_never_overwritten_without_force(capsys, toy, recorded, tmp_path):
    before = (recorded / "run.json").read_bytes()
    assert "--force" in refused(capsys, story(toy, recorded), 1)
    assert (recorded / "run.json").read_bytes() == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    assert "Nothing was deleted" in refused(capsys, [*story(toy, tmp_path / "mine"), "--force"], 1)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"


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
    config = json.loads((other / "transformer" / "config.json").read_text())
    (other / "transformer" / "config.json").write_text(json.dumps(config | {"_class_name": "LatteTransformer3DModel"}))
    line = refused(capsys, story(str(other), tmp_path / "run"), 1)
    assert "Got LatteTransformer3DModel" in line
    assert "Known: CogVideoXTransformer3DModel" in line


def test_an_unexpected_error_is_a_sentence_and_debug_shows_it(capsys, toy, tmp_path, monkeypatch):
    from recipes import run

    monkeypatch.setattr(run, "finish_video", lambda *a: 1 / 0)
    arguments = story(toy, tmp_path / "run")
    assert "Got ZeroDivisionError" in refused(capsys, arguments, 1)
    assert Run(tmp_path / "run").status == "failed"
    with pytest.raises(ZeroDivisionError):
        main([*arguments, "--force", "--debug"])


def test_reading_a_run_that_is_none(capsys, tmp_path):
    assert "run.json" in refused(capsys, ["maps", str(tmp_path)], 1)


def test_reading_an_unknown_word(capsys, recorded):
    assert "zebra" in refused(capsys, ["maps", str(recorded), "--word", "zebra"], 2)


def test_interrupt_in_the_middle(toy, tmp_path):
    out = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "recipes.cli",
        "run",
        "ditctrl",
        "-m",
        toy,
        *TWO,
        "--set",
        "steps=1000",
        "--out",
        str(out),
    ]
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    deadline = time.monotonic() + 120
    while child.poll() is None and len(list(out.glob("steps/*.h5"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.1)
    child.send_signal(signal.SIGINT)
    said = child.communicate(timeout=60)[1]
    assert child.returncode == 1
    assert "Traceback" not in said
    assert "finished steps stay readable" in said.splitlines()[-1]
    run = Run(out)
    assert run.status == "interrupted"
    assert len(run.steps) >= 3
    assert run.word_map("cat", step=run.steps[-1]).shape == (3, 4, 4)


@pytest.mark.parametrize("stopped_after", [1, 3, 5])
def test_a_stopped_run_goes_on_to_the_same_video(toy, recorded, tmp_path, monkeypatch, capsys, stopped_after):
    from recipes import run

    folder = tmp_path / "run"
    real = run._on_step

    def stopping(session, recorder, bar):
        write = real(session, recorder, bar)

        def on_step(state):
            write(state)
            if state.step == stopped_after:
                raise KeyboardInterrupt

        return on_step

    monkeypatch.setattr(run, "_on_step", stopping)
    line = refused(capsys, story(toy, folder), 1)
    assert f"{stopped_after} finished steps stay readable" in line
    assert Run(folder).status == "interrupted"
    monkeypatch.setattr(run, "_on_step", real)
    main_ok(["resume", str(folder)])
    assert Run(folder).status == "done"
    assert Run(folder).steps == (0, 1, 2, 3, 4)
    assert (folder / "video.gif").read_bytes() == (recorded / "video.gif").read_bytes()
    assert "must have stopped early" in refused(capsys, ["resume", str(folder)], 1)


@pytest.fixture(scope="module")
def stopped(toy, tmp_path_factory):
    """A run that failed at its very end."""
    from recipes import run

    folder = tmp_path_factory.mktemp("runs") / "stopped"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "finish_video", lambda *a: 1 / 0)
        with pytest.raises(SystemExit):
            main(story(toy, folder))
    assert Run(folder).status == "failed"
    return folder


@pytest.mark.parametrize("name", [*resume.SOFTWARE, *resume.NUMBERS])
def test_a_run_made_otherwise_does_not_go_on(stopped, tmp_path, capsys, name):
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    info = json.loads((folder / "run.json").read_text())
    assert name in info
    (folder / "run.json").write_text(json.dumps(info | {name: "another"}))
    assert f"Got another {name}: " in refused(capsys, ["resume", str(folder)], 1)


def test_an_edited_recipe_does_not_go_on(stopped, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    text = (folder / "recipe.yaml").read_text().replace("seed: 3", "seed: 4")
    (folder / "recipe.yaml").write_text(text)
    assert "Got another recipe: " in refused(capsys, ["resume", str(folder)], 1)


def test_the_fingerprint_knows_a_changed_model(toy, tmp_path):
    from probe.provenance import fingerprint

    seen = {fingerprint(Path(toy))}
    for i, name in enumerate(
        ("model_index.json", "transformer/config.json", "transformer/diffusion_pytorch_model.safetensors")
    ):
        copy = tmp_path / str(i)
        shutil.copytree(toy, copy)
        data = (copy / name).read_bytes()
        (copy / name).write_bytes(data[:-1] + b" ")
        seen.add(fingerprint(copy))
    assert len(seen) == 4
    assert fingerprint(tmp_path / "nowhere") is None


def test_heat_of_a_segment_lies_on_its_own_frames(recorded):
    run, lift = Run(recorded), np.zeros((3, 4, 4), np.float32)
    lift[1, 2, 3] = 1.0
    picked = heatmap.Picked("dog", None, None, None, 3, "vt", lift)
    frames, heated = heatmap._heat(run, picked)
    changed = (np.abs(heated.astype(int) - frames) > 3).any(-1)
    # latent frames 3, 4, 5 of 6 are pixel frames 9 to 20; the middle one is 13 to 16
    assert len(frames) == 12
    whole = np.asarray(iio.imread(run.video))
    assert np.array_equal(frames, whole[9:21])
    assert changed.any((1, 2)).tolist() == [False] * 4 + [True] * 4 + [False] * 4
    assert not changed[:, :128].any()


def test_maps_without_ffmpeg_lie_on_the_gif(recorded, tmp_path, monkeypatch):
    monkeypatch.setattr("probe.film.has_ffmpeg", lambda: False)
    main_ok(["maps", str(recorded), "--word", "dog", "--out", str(tmp_path / "dog.png")])
    assert (tmp_path / "dog.png").stat().st_size > 1000


@pytest.mark.parametrize("extra", [["--export", "gif", "--out", "x.txt"], ["--out", "x"], ["--out", "x.pdf"]])
def test_an_export_of_no_kind(recorded, capsys, extra):
    assert "must be a file ending in .npz" in refused(capsys, ["maps", str(recorded), "--word", "dog", *extra], 2)


def test_interrupt_before_anything_was_written(toy, tmp_path, monkeypatch, capsys):
    from recipes import run

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "load", interrupted)
    assert "Interrupted before anything was written" in refused(capsys, story(toy, tmp_path / "run"), 1)
    assert not (tmp_path / "run").exists()


def test_without_the_model_libraries(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "probe.models.prove", None)
    assert "Got no probe.models.prove. Run: pip install" in refused(capsys, ["check", toy], 1)


def test_what_probe_record_made_cannot_be_resumed(tmp_path, capsys):
    pipe = tiny.pipeline()
    run = probe.record(pipe, tiny.PROMPT, words="cat", out=tmp_path / "run", num_inference_steps=2)
    assert run.words == ("cat",)
    info = json.loads((run.path / "run.json").read_text())
    (run.path / "run.json").write_text(json.dumps(info | {"status": "failed"}))
    assert "made by probe.record" in refused(capsys, ["resume", str(run.path)], 1)


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


def test_the_shipped_recipes_are_what_they_say():
    from recipes import parse

    for name in parse.names():
        recipe = parse.load(name)
        assert recipe.name == name
        assert parse.validate(yaml.safe_load(parse.dump(recipe)), name) == recipe
