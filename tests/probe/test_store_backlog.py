"""Steps are written behind the model's back: in order, bounded, and no error is lost."""

from __future__ import annotations

import errno
import os
import threading
import time

import numpy as np
import pytest

from probe import folder as files
from probe import store_writer
from probe.errors import StoreError
from probe.store import Run, RunWriter
from probe.store_backlog import Backlog
from tests.probe.samples import child, lift, record

SECONDS = 20


@pytest.fixture
def gate(monkeypatch):
    """Packing waits until the gate is set."""
    opened, real = threading.Event(), store_writer.pack_step

    def pack(*given):
        assert opened.wait(SECONDS)
        return real(*given)

    monkeypatch.setattr(store_writer, "pack_step", pack)
    yield opened
    opened.set()


def full_disk_at(monkeypatch, name):
    """The disk refuses one file of that name, then has room again."""
    real, refused = files.replace_file, []

    def replace(path, data):
        if path.name == name and not refused:
            refused.append(name)
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, data)

    monkeypatch.setattr(files, "replace_file", replace)


def store_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("store")]


def test_the_model_goes_on_while_a_step_is_packed_and_waits_for_the_third(tmp_path, gate):
    with RunWriter.create(tmp_path / "run", {}, "") as writer:
        for step in range(2):
            writer.write_step(step, {}, [record(step)], {"at": step})
        assert Run(writer.folder).steps == ()
        third = threading.Thread(target=writer.write_step, args=(2, {}, [record(2)], {"at": 2}))
        third.start()
        third.join(0.2)
        assert third.is_alive()
        gate.set()
        third.join(SECONDS)
        assert not third.is_alive()
    run = Run(tmp_path / "run")
    assert (run.steps, run.resume()) == ((0, 1, 2), (2, {"at": 2}))
    for step in run.steps:
        np.testing.assert_allclose(run.word_map("red", step=step, layer=1, head=0), lift(step)[0, 0, 0], rtol=0.03)


def test_steps_are_written_in_the_order_they_came(tmp_path, monkeypatch):
    order, real = [], store_writer.save_file
    monkeypatch.setattr(store_writer, "save_file", lambda path, data: (order.append(path.name), real(path, data)))
    steps = np.random.default_rng(0).permutation(20).tolist()
    with RunWriter.create(tmp_path / "run", {}, "") as writer:
        for step in steps:
            writer.write_step(step, {}, [])
    assert order == ["recipe.yaml", *(f"step_{step:04d}.h5" for step in steps)]


def test_the_end_waits_for_every_step_and_ends_the_thread(tmp_path, gate):
    before = len(store_threads())
    writer = RunWriter.create(tmp_path / "run", {}, "")
    for step in range(2):
        writer.write_step(step, {}, [])
    assert len(store_threads()) == before + 1
    threading.Timer(0.1, gate.set).start()
    writer.finish("done")
    assert Run(writer.folder).steps == (0, 1)
    assert eventually(lambda: len(store_threads()) == before)


def eventually(condition):
    deadline = time.monotonic() + SECONDS
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_steps_in_hand_are_written_when_the_run_breaks_off(tmp_path, gate, error):
    with pytest.raises(error), RunWriter.create(tmp_path / "run", {}, "") as writer:
        for step in range(2):
            writer.write_step(step, {}, [record(step)], {"at": step})
        threading.Timer(0.1, gate.set).start()
        raise error
    run = Run(tmp_path / "run")
    assert (run.steps, run.resume()[0]) == ((0, 1), 1)
    assert run.status == ("interrupted" if error is KeyboardInterrupt else "failed")


# --- errors ---


def test_an_error_is_heard_at_the_next_step_and_what_came_before_is_intact(tmp_path, monkeypatch):
    full_disk_at(monkeypatch, "step_0001.h5")
    said = "^step_0001.h5 must be written whole. Got 'No space left on device' for"
    with pytest.raises(StoreError, match=said), RunWriter.create(tmp_path / "run", {}, "") as writer:
        for step in range(10):
            writer.write_step(step, {}, [], {"at": step})
    run = Run(tmp_path / "run")
    assert (run.steps, run.resume(), run.status) == ((0,), (0, {"at": 0}), "failed")
    assert run.info["error"].startswith("step_0001.h5 must be written whole.")


def test_steps_behind_an_error_are_not_written_so_that_none_is_missing_between(tmp_path, gate, monkeypatch):
    full_disk_at(monkeypatch, "step_0000.h5")
    writer = RunWriter.create(tmp_path / "run", {}, "")
    for step in range(2):
        writer.write_step(step, {}, [], {"at": step})
    gate.set()
    with pytest.raises(StoreError, match="step_0000.h5 must be written whole."):
        writer.flush()
    run = Run(writer.folder)
    assert (run.steps, run.has_state) == ((), False)
    writer.flush()  # said once
    for step in range(2):
        writer.write_step(step, {}, [], {"at": step})
    writer.finish("done")
    assert (run.steps, run.resume()[0], run.status) == ((0, 1), 1, "done")


def test_an_error_of_the_last_step_is_heard_at_the_end_and_the_run_is_not_done(tmp_path, monkeypatch):
    full_disk_at(monkeypatch, "step_0003.h5")
    writer = RunWriter.create(tmp_path / "run", {}, "")
    for step in range(4):
        writer.write_step(step, {}, [])
    with pytest.raises(StoreError, match="step_0003.h5 must be written whole"):
        writer.finish("done")
    run = Run(writer.folder)
    assert (run.steps, run.status) == ((0, 1, 2), "failed")
    assert run.info["error"].startswith("step_0003.h5 must be written whole")
    RunWriter.reopen(writer.folder).finish("done")  # the folder is free


def test_the_first_error_is_the_one_that_is_kept(tmp_path, monkeypatch):
    full_disk_at(monkeypatch, "step_0000.h5")
    with pytest.raises(ZeroDivisionError), RunWriter.create(tmp_path / "run", {}, "") as writer:
        writer.write_step(0, {}, [])
        _ = 1 / 0
    run = Run(tmp_path / "run")
    assert (run.status, run.info["error"]) == ("failed", "ZeroDivisionError: division by zero")


def test_any_other_error_of_the_thread_is_a_sentence(tmp_path, monkeypatch):
    def out_of_memory(*_):
        raise MemoryError("Unable to allocate 3 GiB")

    monkeypatch.setattr(store_writer, "pack_step", out_of_memory)
    with RunWriter.create(tmp_path / "run", {}, "") as writer:
        writer.write_step(7, {}, [])
        with pytest.raises(StoreError) as caught:
            writer.flush()
    said = "step 7 must be stored. Got MemoryError: Unable to allocate 3 GiB. Everything finished before is intact."
    assert str(caught.value) == said


# --- threads and processes ---


def test_threads_may_share_a_writer(tmp_path):
    with RunWriter.create(tmp_path / "run", {}, "") as writer:
        workers = [
            threading.Thread(
                target=lambda first: [writer.write_step(first + i, {"at": first + i}, []) for i in range(8)],
                args=(8 * number,),
            )
            for number in range(4)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(SECONDS)
    run = Run(tmp_path / "run")
    assert run.steps == tuple(range(32))
    assert [run.step_attrs(step)["at"] for step in run.steps] == list(range(32))


def test_a_run_can_be_read_while_it_is_written(tmp_path):
    """Reader and background thread share one HDF5 library."""
    with RunWriter.create(tmp_path / "run", {}, "") as writer:
        run, read = Run(writer.folder), 0
        for step in range(15):
            writer.write_step(step, {}, [record(step)], {"at": step})
            for seen in run.steps[-2:]:
                read += 1
                found = run.word_map("circle", step=seen, layer=4, head=2)
                np.testing.assert_allclose(found, lift(seen)[1, 2, 1], rtol=0.03)
    assert read > 10


def test_an_interpreter_that_ends_without_a_word_writes_what_it_was_given(tmp_path):
    code = """
        import sys, time
        from probe import store_writer
        from probe.store import RunWriter
        real = store_writer.pack_step
        store_writer.pack_step = lambda *given: (time.sleep(0.2), real(*given))[1]
        writer = RunWriter.create(sys.argv[1], {}, "")
        for step in range(2):
            writer.write_step(step, {}, [], {"at": step})
        print(*writer.folder.glob("steps/*.h5"))
    """
    with child(code, tmp_path / "run") as writer:
        assert writer.out.read() == "\n"
        assert writer.process.wait(SECONDS) == 0
    run = Run(tmp_path / "run")
    assert (run.steps, run.resume()[0], run.status) == ((0, 1), 1, "interrupted")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_copy_of_the_writer_is_refused_and_harms_nothing(tmp_path):
    code = """
        import os, signal, sys
        from probe.store import RunWriter
        signal.alarm(20)  # a copy has no thread that writes: it would wait for ever
        with RunWriter.create(sys.argv[1], {}, "") as writer:
            writer.write_step(0, {}, [], {"at": 0})
            if os.fork() == 0:
                signal.alarm(10)
                for call in (lambda: writer.write_step(1, {}, []), writer.flush, lambda: writer.finish("done")):
                    try:
                        call()
                    except Exception as error:
                        print(type(error).__name__, error, flush=True)
                raise SystemExit
            os.wait()
            writer.write_step(1, {}, [], {"at": 1})
    """
    with child(code, tmp_path / "run") as writer:
        said = writer.out.read().splitlines()
        assert writer.process.wait(SECONDS) == 0
    assert len(said) == 3
    assert all(line.startswith("StoreError run folder must be written by the process that opened it.") for line in said)
    run = Run(tmp_path / "run")
    assert (run.steps, run.resume()[0], run.status) == ((0, 1), 1, "done")


def test_a_backlog_does_what_it_takes_in_order_and_no_more_than_its_limit():
    done, opened = [], threading.Event()
    backlog = Backlog(3)
    backlog.add(lambda: opened.wait(SECONDS) and done.append(0))
    for number in (1, 2):
        backlog.add(lambda number=number: done.append(number))
    waiting = threading.Thread(target=backlog.add, args=(lambda: done.append(3),))
    waiting.start()
    waiting.join(0.1)
    assert waiting.is_alive()
    assert done == []
    opened.set()
    waiting.join(SECONDS)
    backlog.close()
    assert done == [0, 1, 2, 3]
