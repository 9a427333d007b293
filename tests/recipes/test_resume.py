"""A stopped run goes on to the same bits, or says why it cannot."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import pytest

import probe
from probe.store import Run
from recipes import resume
from tests import tiny
from tests.recipes.line import TWO, main_ok, refused, story


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
    listen = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731  # a background shell ignores it
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, preexec_fn=listen)
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


def test_interrupt_before_anything_was_written(toy, tmp_path, monkeypatch, capsys):
    from recipes import run

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "load", interrupted)
    assert "Interrupted before anything was written" in refused(capsys, story(toy, tmp_path / "run"), 1)
    assert not (tmp_path / "run").exists()


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


@pytest.mark.parametrize("name", [*resume.SOFTWARE, *resume.NUMBERS])
def test_a_run_made_otherwise_does_not_go_on(stopped, tmp_path, capsys, name):
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    info = json.loads((folder / "run.json").read_text())
    assert name in info
    (folder / "run.json").write_text(json.dumps(info | {name: "another"}))
    assert f"Got another {name}: " in refused(capsys, ["resume", str(folder)], 1)


def test_a_run_stopped_before_its_first_state_starts_from_noise(stopped, recorded, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    (folder / "resume.h5").unlink()
    for path in sorted((folder / "steps").iterdir())[1:]:
        path.unlink()
    main_ok(["resume", str(folder)])
    assert Run(folder).steps == (0, 1, 2, 3, 4)
    assert (folder / "video.gif").read_bytes() == (recorded / "video.gif").read_bytes()


def test_a_state_that_is_lost_or_damaged_is_one_sentence(stopped, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    state = folder / "resume.h5"
    with h5py.File(state, "a") as file:
        file.attrs["schema"] = 2
    assert "must be a 'mmdit-lab resume' of schema 1. Got" in refused(capsys, ["resume", str(folder)], 1)
    state.write_bytes(state.read_bytes()[:700])
    assert "resume state must be whole. Got a damaged" in refused(capsys, ["resume", str(folder)], 1)
    state.unlink()
    assert "run must hold a resume state. Got no resume.h5" in refused(capsys, ["resume", str(folder)], 1)
    assert Run(folder).steps == (0, 1, 2, 3, 4)


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


def test_what_probe_record_made_cannot_be_resumed(tmp_path, capsys):
    pipe = tiny.pipeline()
    run = probe.record(pipe, tiny.PROMPT, words="cat", out=tmp_path / "run", num_inference_steps=2)
    assert run.words == ("cat",)
    info = json.loads((run.path / "run.json").read_text())
    (run.path / "run.json").write_text(json.dumps(info | {"status": "failed"}))
    assert "made by probe.record" in refused(capsys, ["resume", str(run.path)], 1)
