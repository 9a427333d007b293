"""What is left of a run when the disk fills up, the process is killed, or someone else wants the folder."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from probe.errors import StoreError
from probe.folder import live_writer, step_files
from probe.store import Run, RunWriter, refuse_taken
from tests.probe.samples import child, lift, record, write_run


def full_disk(*_args, **_more):
    raise OSError(errno.ENOSPC, "No space left on device")


def left_over(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*.tmp"))


# --- the disk is full ---


@pytest.mark.parametrize("where", ["os.fsync", "os.replace"])
def test_full_disk_is_one_sentence_and_earlier_steps_are_intact(tmp_path, monkeypatch, where):
    writer = RunWriter.create(tmp_path / "run", {}, "")
    writer.write_step(0, {}, [record(0)])
    writer.flush()
    with monkeypatch.context() as patch:
        patch.setattr(where, full_disk)
        with pytest.raises(StoreError) as caught:
            writer.write_step(1, {}, [record(1)])
            writer.flush()
    said = str(caught.value)
    assert said.startswith("step_0001.h5 must be written whole. Got 'No space left on device' for ")
    assert said.endswith(" free). Make room; everything finished before is intact.")
    assert left_over(tmp_path) == []
    run = Run(writer.folder)
    assert run.steps == (0,)
    np.testing.assert_allclose(run.word_map("red", layer=1, head=0), lift(0)[0, 0, 0], rtol=0.03)
    writer.write_step(1, {}, [record(1)])
    writer.flush()
    assert run.steps == (0, 1)


def test_a_rewritten_step_survives_a_full_disk(tmp_path, monkeypatch):
    writer = RunWriter.create(tmp_path / "run", {}, "")
    writer.write_step(0, {"timestep": 1}, [])
    writer.flush()
    with monkeypatch.context() as patch, pytest.raises(StoreError):
        patch.setattr(os, "replace", full_disk)
        writer.write_step(0, {"timestep": 2}, [])
        writer.flush()
    assert Run(writer.folder).step_attrs(0)["timestep"] == 1


def test_a_real_refusal_of_the_system_is_one_sentence(tmp_path):
    """A limit on file size makes write() fail in the middle of a file, as a full disk does."""
    code = """
        import resource, sys
        from tests.probe.samples import record
        from probe.store import RunWriter
        writer = RunWriter.create(sys.argv[1], {}, "")
        writer.write_step(0, {}, [record(0)])
        writer.flush()
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        try:
            writer.write_step(1, {}, [record(1)])
            writer.flush()
        except Exception as error:
            print(type(error).__name__, error)
    """
    with child(code, tmp_path / "run") as writer:
        said = writer.out.read()
    assert said.startswith("StoreError step_0001.h5 must be written whole. Got 'File too large' for")
    assert said.count("\n") == 1
    assert left_over(tmp_path) == []
    assert Run(tmp_path / "run").steps == (0,)


def test_a_failed_end_leaves_the_old_status_and_frees_the_folder(tmp_path, monkeypatch):
    writer = RunWriter.create(tmp_path / "run", {"seed": 3}, "")
    with (
        monkeypatch.context() as patch,
        pytest.raises(StoreError, match="run.json must be written whole. Got 'No space"),
    ):
        patch.setattr(os, "replace", full_disk)
        writer.finish("done")
    run = Run(writer.folder)
    assert (run.status, run.info["status"], run.info["seed"]) == ("interrupted", "running", 3)
    assert left_over(tmp_path) == []


def test_a_failed_start_leaves_no_folder(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(StoreError, match="recipe.yaml must be written whole"):
        patch.setattr(os, "replace", full_disk)
        RunWriter.create(tmp_path / "run", {}, "")
    assert not (tmp_path / "run").exists()


# --- the process ends ---


def test_an_error_makes_the_run_failed_and_is_kept(tmp_path):
    with pytest.raises(StoreError, match="step must be 0"), RunWriter.create(tmp_path / "a", {}, "") as writer:
        writer.write_step(-3, {}, [])
    with pytest.raises(ZeroDivisionError), RunWriter.create(tmp_path / "b", {}, ""):
        _ = 1 / 0
    assert Run(tmp_path / "a").status == Run(tmp_path / "b").status == "failed"
    assert Run(tmp_path / "a").info["error"].startswith("step must be 0 or more. Got -3.")
    assert Run(tmp_path / "b").info["error"] == "ZeroDivisionError: division by zero"
    assert live_writer(tmp_path / "a") is None


def test_ctrl_c_makes_the_run_interrupted(tmp_path):
    with pytest.raises(KeyboardInterrupt), RunWriter.create(tmp_path / "run", {}, ""):
        raise KeyboardInterrupt
    assert Run(tmp_path / "run").info["status"] == "interrupted"


def test_an_error_is_not_hidden_by_the_failure_to_note_it(tmp_path, monkeypatch):
    with pytest.raises(ZeroDivisionError), RunWriter.create(tmp_path / "run", {}, ""):
        monkeypatch.setattr(os, "replace", full_disk)
        _ = 1 / 0
    monkeypatch.undo()
    assert Run(tmp_path / "run").status == "interrupted"


WRITE_ON = """
    import sys
    from tests.probe.samples import record
    from probe.store import RunWriter
    writer = RunWriter.create(sys.argv[1], {}, "")
    records = [record(step) for step in range(4)]
    for step in range(500):
        writer.write_step(step, {}, [records[step % 4]], {"step": step})
        writer.flush()
        print(step, flush=True)
"""


def test_a_killed_run_is_taken_over_and_a_live_one_is_not(tmp_path):
    folder = tmp_path / "run"
    with child(WRITE_ON, folder) as writer:
        writer.out.readline()
        said = f"run folder must have one writer. Got {folder}, where process {writer.process.pid} is writing."
        with pytest.raises(StoreError, match=said):
            RunWriter.reopen(folder)
        with pytest.raises(StoreError, match="--force must not replace a run in progress. Got"):
            RunWriter.create(folder, {}, "", force=True)
        assert Run(folder).status == "running"
        writer.process.kill()
        writer.out.read()
        # nobody has waited for the process yet: it is a zombie, and writes no more
        assert eventually(lambda: live_writer(folder) is None)
    with RunWriter.reopen(folder) as again:
        assert Run(folder).status == "running"
        last, _ = Run(folder).resume()
        again.write_step(last + 1, {}, [])
    assert Run(folder).status == "done"


def eventually(condition: Callable[[], bool], seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def test_a_process_that_only_has_the_number_of_a_dead_writer_is_not_the_writer(tmp_path):
    RunWriter.create(tmp_path / "run", {}, "")
    lock = tmp_path / "run" / "writer.lock"
    held = json.loads(lock.read_text())
    assert live_writer(tmp_path / "run") == os.getpid()
    lock.write_text(json.dumps(held | {"born": "1"}))
    assert live_writer(tmp_path / "run") is None


@pytest.mark.parametrize("text", ["", "[]", '{"pid": "x"}'])
def test_a_damaged_lock_holds_nobody_up(tmp_path, text):
    RunWriter.create(tmp_path / "run", {}, "")
    (tmp_path / "run" / "writer.lock").write_text(text)
    assert Run(tmp_path / "run").status == "interrupted"
    RunWriter.reopen(tmp_path / "run").finish("done")
    assert Run(tmp_path / "run").status == "done"


def test_reopening_clears_the_last_end(tmp_path):
    with pytest.raises(ZeroDivisionError), RunWriter.create(tmp_path / "run", {"seed": 3}, ""):
        _ = 1 / 0
    writer = RunWriter.reopen(tmp_path / "run")
    info = Run(tmp_path / "run").info
    assert (info["status"], info["seed"]) == ("running", 3)
    assert not {"error", "finished"} & set(info)
    writer.finish("done")


# --- the folder is not free ---


def test_a_taken_folder_is_refused_and_force_replaces_a_run(tmp_path):
    write_run(tmp_path / "run", steps=3, seed=1)
    said = "run folder must be new or empty. Got .*run, which holds 4 entries. Choose another path, or pass --force"
    with pytest.raises(StoreError, match=said):
        RunWriter.create(tmp_path / "run", {}, "")
    with pytest.raises(StoreError, match=said):
        refuse_taken(tmp_path / "run")
    refuse_taken(tmp_path / "run", force=True)
    assert Run(tmp_path / "run").steps == (0, 1, 2)
    RunWriter.create(tmp_path / "run", {"seed": 2}, "new", force=True).finish("done")
    run = Run(tmp_path / "run")
    assert (run.info["seed"], run.recipe, run.steps) == (2, "new", ())


@pytest.mark.parametrize("text", [None, "{", "[]", '{"format": "another", "schema": 1}', '{"schema": 1}'])
def test_force_never_touches_a_foreign_folder(tmp_path, text):
    (tmp_path / "thesis.txt").write_text("three years")
    if text is not None:
        (tmp_path / "run.json").write_text(text)
    with pytest.raises(StoreError, match="^--force must replace an earlier run. Got .* Nothing was deleted.$"):
        RunWriter.create(tmp_path, {}, "", force=True)
    assert (tmp_path / "thesis.txt").read_text() == "three years"


def test_an_empty_folder_is_taken(tmp_path):
    refuse_taken(tmp_path)
    refuse_taken(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    RunWriter.create(tmp_path, {}, "").finish("done")
    assert Run(tmp_path).status == "done"


def test_a_folder_that_cannot_be_made_is_said(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "runs" / "one"):
        with pytest.raises(
            StoreError, match=f"must be a folder in a folder. Got {path}, where {tmp_path / 'file'} is a"
        ):
            RunWriter.create(path, {}, "", force=True)

    def denied(self, *_args, **_more):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", denied)
    said = f"run folder must be writable. Got 'Permission denied' for {tmp_path / 'new'}. Choose another path."
    with pytest.raises(StoreError, match=said):
        RunWriter.create(tmp_path / "new", {}, "")


@pytest.mark.parametrize("name", ["status", "schema", "format"])
def test_info_leaves_the_names_of_the_store_alone(tmp_path, name):
    with pytest.raises(StoreError, match=f"run info must leave {name} to the store."):
        RunWriter.create(tmp_path / "run", {name: 1}, "")
    assert not (tmp_path / "run").exists()


def test_info_takes_numpy_numbers_and_refuses_objects(tmp_path):
    info = {"seed": np.int64(4), "sizes": np.arange(2), "out": tmp_path}
    RunWriter.create(tmp_path / "a", info, "").finish("done")
    assert Run(tmp_path / "a").info["sizes"] == [0, 1]
    with pytest.raises(StoreError, match="run info must be plain data. Got a value of type object."):
        RunWriter.create(tmp_path / "b", {"x": object()}, "")


# --- the folder is not a run, or a file in it is damaged ---


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "run folder must hold run.json. Got .* without one. Name the folder of one run."),
        ('{"format": "mmdit-lab run", "sche', "run.json must be whole JSON. Got a damaged .*run.json. Restore it"),
        ("[1]", "run.json must have the format 'mmdit-lab run'. Got a foreign .*run.json."),
        ('{"format": "mmdit-lab run", "schema": 2}', "run schema must be 1. Got 2 in .*run.json. Read it with the"),
    ],
)
def test_what_is_no_run_is_said(tmp_path, text, said):
    if text is not None:
        (tmp_path / "run.json").write_text(text)
    with pytest.raises(StoreError, match=said):
        Run(tmp_path)


def test_no_folder_is_said(tmp_path):
    with pytest.raises(StoreError, match="run must be a folder. Got .*nowhere, which does not exist or is a file."):
        Run(tmp_path / "nowhere")


def test_a_truncated_step_is_left_out_and_named(tmp_path):
    run = write_run(tmp_path / "run", steps=3)
    path = run.path / "steps" / "step_0001.h5"
    path.write_bytes(path.read_bytes()[:900])
    assert run.steps == (0, 2)
    assert run.broken == (path,)
    expected = np.mean([lift(0), lift(2)], axis=0)[:, :, 0].mean((0, 1))
    np.testing.assert_allclose(run.word_map("red"), expected, rtol=0.03)
    with pytest.raises(StoreError, match=f"step file must be whole. Got a damaged or unreadable {path} "):
        run.word_map("red", step=1)


def test_a_foreign_step_is_named(tmp_path):
    import h5py

    run = write_run(tmp_path / "run", steps=2)
    path = run.path / "steps" / "step_0001.h5"
    with h5py.File(path, "w") as file:
        file["x"] = 1
    assert run.steps == (0, 1)
    with pytest.raises(
        StoreError, match=f"step file must be a 'mmdit-lab step' of schema 1. Got {path} with None, None."
    ):
        run.word_map("red")


def test_damage_inside_a_step_is_named(tmp_path):
    run = write_run(tmp_path / "run", steps=1)
    path = run.path / "steps" / "step_0000.h5"
    good = path.read_bytes()
    chunk = good.index(b"\x78\x01")  # the first gzip stream, of a map
    path.write_bytes(good[:chunk] + b"\xff" * 400 + good[chunk + 400 :])
    with pytest.raises(StoreError, match=f"step file must be whole. Got a damaged or unreadable {path}"):
        run.word_map("red")


def test_a_run_that_is_removed_while_it_is_read_is_said(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", steps=1)
    assert run.words
    seen = step_files(run.path)
    shutil.rmtree(run.path)
    monkeypatch.setattr("probe.store_index.step_files", lambda folder: seen)  # listed just before
    assert run.steps == ()
    with pytest.raises(StoreError, match="step file must be whole. Got a damaged or unreadable"):
        run.step_attrs(0)
    with pytest.raises(StoreError, match="run must be a folder. Got .*run, which does not exist"):
        _ = run.info


def test_unfinished_and_strange_files_are_passed_over(tmp_path):
    run = write_run(tmp_path / "run", steps=1)
    for name in ("step_0001.h5.tmp", "step_1.h5", "notes.txt"):
        (run.path / "steps" / name).write_bytes(b"half")
    assert (run.steps, run.broken) == ((0,), ())
