"""The one state from which a stopped run goes on: exact, behind its step file, and whole or refused."""

from __future__ import annotations

import errno
import shutil

import h5py
import numpy as np
import pytest

from probe import folder as files
from probe.errors import StoreError
from probe.store import Run, RunWriter
from tests.probe.samples import record, write_run

STATE = {
    "latents": np.random.default_rng(0).normal(size=(2, 3)).astype(np.float16),
    "generator": bytes(range(256)) + b"\0\0",
    "empty": b"",
    "timestep": 999,
    "sigma": 0.1,
    "seed": 2**64 - 1,
    "huge": 2**80,
    "sampler": "ddim",
    "odd": "json:[1]",
    "nul": "a\0b",
    "plan": {"banked": ["cpu", None], "fuse": False},
    "count": np.int64(4),
    "scalar": np.array(2.5),
}


@pytest.fixture
def writer(tmp_path):
    with RunWriter.create(tmp_path / "run", {}, "") as writer:
        yield writer


def test_the_state_is_exact_and_the_newest_replaces_the_one_before(writer):
    writer.write_step(0, {}, [], {"latents": np.zeros(1), "old": 1})
    writer.write_step(3, {}, [], STATE)
    writer.flush()
    step, found = Run(writer.folder).resume()
    assert step == 3
    assert sorted(found) == sorted(STATE)
    assert found["latents"].dtype == np.float16
    np.testing.assert_array_equal(found["latents"], STATE["latents"])
    plain = {name: value for name, value in STATE.items() if name not in ("latents", "scalar")}
    assert {name: found[name] for name in plain} == plain
    assert found["scalar"] == 2.5
    assert type(found["timestep"]) is int


def test_the_state_is_copied_when_it_is_handed_over(writer):
    latents = np.zeros(1_000_000, np.float32)
    for step in range(4):
        latents += 1
        writer.write_step(step, {}, [], {"latents": latents})
    latents += 1
    writer.flush()
    step, found = Run(writer.folder).resume()
    assert step == 3
    assert (found["latents"] == 4).all()


def test_step_files_do_not_grow_with_the_state(writer):
    for step in range(3):
        writer.write_step(step, {}, [], {"latents": np.zeros(50_000)})
    writer.flush()
    assert max(path.stat().st_size for path in (writer.folder / "steps").iterdir()) < 10_000
    assert (writer.folder / "resume.h5").stat().st_size > 400_000


def test_a_step_without_a_state_leaves_the_one_before(writer):
    writer.write_step(0, {}, [], {"latents": np.full(2, 7)})
    writer.write_step(1, {}, [record()])
    writer.flush()
    run = Run(writer.folder)
    assert (run.steps, run.has_state) == ((0, 1), True)
    assert run.resume()[0] == 0


def test_a_stop_between_a_step_and_its_state_gives_the_state_before(writer, monkeypatch):
    writer.write_step(0, {}, [record(0)], {"at": 0})
    writer.flush()
    real = files.replace_file

    def no_room_for_states(path, data):
        if path.name == "resume.h5":
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, data)

    with monkeypatch.context() as patch, pytest.raises(StoreError, match="resume.h5 must be written whole. Got 'No"):
        patch.setattr(files, "replace_file", no_room_for_states)
        writer.write_step(1, {}, [record(1)], {"at": 1})
        writer.flush()
    run = Run(writer.folder)
    assert run.steps == (0, 1)
    assert run.resume() == (0, {"at": 0})
    writer.write_step(1, {}, [record(1)], {"at": 1})
    writer.flush()
    assert run.resume() == (1, {"at": 1})


def test_the_file_of_a_step_is_there_before_its_state(writer, monkeypatch):
    order, real = [], files.replace_file
    monkeypatch.setattr(files, "replace_file", lambda path, data: (real(path, data), order.append(path.name)))
    for step in range(3):
        writer.write_step(step, {}, [], {"at": step})
    writer.flush()
    assert order == [name for step in range(3) for name in (f"step_000{step}.h5", "resume.h5")]


# --- the state is not there, or not whole ---


def refusal(run):
    with pytest.raises(StoreError) as caught:
        run.resume()
    said = str(caught.value)
    assert "\n" not in said
    assert said.endswith("tart the run again; its finished steps stay readable.")
    return said


def test_no_state_is_said(writer):
    writer.write_step(0, {}, [record()])
    writer.flush()
    run = Run(writer.folder)
    assert not run.has_state
    assert refusal(run).startswith(f"run must hold a resume state. Got no resume.h5 in {run.path}. ")


@pytest.mark.parametrize("length", [0, 1, 500, -9])
def test_a_truncated_state_is_said(tmp_path, length):
    run = write_run(tmp_path / "run", steps=2)
    path = run.path / "resume.h5"
    path.write_bytes(path.read_bytes()[:length])
    assert refusal(run).startswith(f"resume state must be whole. Got a damaged or unreadable {path} ")
    assert run.steps == (0, 1)
    assert run.word_map("red", step=1).any()


def test_a_foreign_state_is_said(tmp_path):
    run = write_run(tmp_path / "run", steps=1)
    shutil.copyfile(run.path / "steps" / "step_0000.h5", run.path / "resume.h5")
    assert "must be a 'mmdit-lab resume' of schema 1. Got" in refusal(run)
    (run.path / "resume.h5").write_text("not HDF5")
    assert "must be whole" in refusal(run)


@pytest.mark.parametrize("schema", [0, 2, "1"])
def test_a_state_of_another_schema_is_said(tmp_path, schema):
    run = write_run(tmp_path / "run", steps=1)
    with h5py.File(run.path / "resume.h5", "a") as file:
        file.attrs["schema"] = schema
    said = (
        f"resume state must be a 'mmdit-lab resume' of schema 1. Got {run.path / 'resume.h5'} with 'mmdit-lab resume'"
    )
    assert refusal(run).startswith(f"{said}, {schema!r}. ")


def test_a_state_without_its_part_is_said(tmp_path):
    run = write_run(tmp_path / "run", steps=1)
    with h5py.File(run.path / "resume.h5", "a") as file:
        del file["state"]
    assert refusal(run).startswith("resume state must be whole. Got a damaged or unreadable")


def test_a_state_whose_step_is_gone_is_said(tmp_path):
    run = write_run(tmp_path / "run", steps=3)
    path = run.path / "steps" / "step_0002.h5"
    path.write_bytes(path.read_bytes()[:900])
    said = f"resume state must follow a step whose file is whole. Got step 2 in {run.path}, which has 0, 1. "
    assert refusal(run).startswith(said)
    path.unlink()
    assert refusal(run).startswith(said)
