"""What is written is what is read, and every wrong request is answered in one sentence."""

from __future__ import annotations

import subprocess
import sys

import h5py
import numpy as np
import pytest

from probe.errors import StoreError, UsageError, WordError
from probe.store import Run, RunWriter, list_runs
from tests.probe.samples import GRID, HEADS, LAYERS, WORDS, lift, record, write_run


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run", steps=2, seed=7)


@pytest.fixture
def writer(tmp_path):
    with RunWriter.create(tmp_path / "run", {}, "") as writer:
        yield writer


def written(writer):
    writer.flush()
    return Run(writer.folder)


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0.03, atol=1e-6)


def test_a_run_tells_what_it_holds(run):
    assert (run.status, run.steps, run.words, run.layers) == ("done", (0, 1), WORDS, LAYERS)
    assert run.segments == ((0, "plain"),)
    assert run.recipe == "steps: 2\n"
    assert run.info["seed"] == 7
    assert run.info["started"] <= run.info["finished"]
    assert run.step_attrs(1)["timestep"] == 998
    assert run.segment_words() == WORDS
    assert run.broken == ()
    assert repr(run).endswith("status='done', steps=2)")


def test_segment_attributes_come_back_as_they_were(run):
    attrs = run.segment_attrs()
    assert attrs == {"start_frame": 0, "grid": [2, 3, 4], "prompt": "a red circle", "mix": 0.25, "guided": True} | {
        "heads": "each"
    }
    assert attrs["guided"] is True


def test_one_map(run):
    close(run.word_map("circle", layer=4, step=1, head=2), lift(1)[1, 2, 1])
    close(run.word_map("red", layer=1, step=0, head=0), lift(0)[0, 0, 0])


def test_maps_are_means_over_what_is_left_open(run):
    both = np.stack([lift(0), lift(1)])
    assert run.word_map("circle").dtype == np.float32
    assert run.word_map("circle").shape == GRID
    close(run.word_map("circle"), both[:, :, :, 1].mean((0, 1, 2)))
    close(run.word_map("circle", step=1), both[1, :, :, 1].mean((0, 1)))
    close(run.word_map("circle", layer=4), both[:, 1, :, 1].mean((0, 1)))
    close(run.word_map("circle", head=0), both[:, :, 0, 1].mean((0, 1)))


def test_both_directions_and_the_mean_over_heads(writer):
    maps = {"vt": lift(3, heads=1), "tv": lift(4, heads=1)}
    writer.write_step(0, {}, [record(maps=maps, heads="mean")])
    run = written(writer)
    close(run.word_map("red", layer=1, direction="tv"), maps["tv"][0, 0, 0])
    close(run.word_map("red", layer=1), maps["vt"][0, 0, 0])
    with pytest.raises(UsageError, match="head must be left out where maps hold the mean over heads. Got 2. Record"):
        run.word_map("red", head=2)
    assert run.mass(head=2).shape == (3, 4)


def test_mass_word_frames_and_frames(writer):
    frames = np.random.default_rng(5).random((2, HEADS, 2, 3)).astype(np.float32)
    records = [record(0, frames=frames), record(1)]
    for step, one in enumerate(records):
        writer.write_step(step, {}, [one])
    run = written(writer)
    grids = np.array([one.mass for one in records])
    np.testing.assert_array_equal(run.mass_grid(1), grids[1])
    np.testing.assert_allclose(run.mass(), grids.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(run.mass().sum(-1), 1, rtol=1e-6)
    np.testing.assert_allclose(run.mass(step=1, layer=4, head=0), grids[1, 1, 0], rtol=1e-6)
    given = np.array([one.word_frames for one in records])
    np.testing.assert_allclose(run.word_frames(layer=1), given[:, 0].mean((0, 1)), rtol=1e-6)
    np.testing.assert_allclose(run.word_frames("circle", step=0), given[0, :, :, 1].mean((0, 1)), rtol=1e-6)
    np.testing.assert_allclose(run.frames(head=1), frames[:, 1].mean(0), rtol=1e-6)
    with pytest.raises(UsageError, match="step of frames must be one that was recorded. Got 1. Recorded: 0."):
        run.frames(step=1)


def test_tokens(run):
    tokens = run.tokens()
    assert tokens["text"].tolist() == ["▁a", "▁red", "▁circle", "<pad>"]
    assert tokens["id"].tolist() == [3, 8, 9, 0]
    assert tokens["word"].tolist() == [0, 1, 2, -1]
    assert tokens["is_pad"].tolist() == [False, False, False, True]
    assert tokens["is_pad"].dtype == bool


def test_query_and_key_of_chosen_layers(writer):
    query, key = np.random.default_rng(0).normal(size=(2, HEADS, 6, 4)).astype(np.float16)
    writer.write_step(0, {}, [record(qk={4: (query, key)})])
    run = written(writer)
    np.testing.assert_array_equal(run.qk(4, 0)[0], query)
    np.testing.assert_array_equal(run.qk(4, 0)[1], key)
    with pytest.raises(UsageError, match="layer of query and key must be one that was recorded. Got 1. Recorded: 4."):
        run.qk(1, 0)


def test_segments_and_roles_are_chosen_by_word_and_order(writer):
    story = [
        record(1, 0, "source"),
        record(2, 0, "target"),
        record(3, 1, "target", words=("blue", "circle")),
        record(4, 1, "source", words=("blue", "circle")),
    ]
    writer.write_step(0, {}, story)
    run = written(writer)
    assert run.segments == ((0, "source"), (0, "target"), (1, "source"), (1, "target"))
    assert run.words == ("red", "circle", "blue")
    close(run.word_map("circle", layer=1), lift(1)[0, :, 1].mean(0))
    close(run.word_map("circle", layer=1, role="target"), lift(2)[0, :, 1].mean(0))
    close(run.word_map("blue", layer=1), lift(4)[0, :, 0].mean(0))
    close(run.word_map("circle", layer=1, segment=1, role="target"), lift(3)[0, :, 1].mean(0))
    with pytest.raises(WordError, match="Got 'blue'. Recorded: red, circle."):
        run.word_map("blue", segment=0)
    with pytest.raises(UsageError, match="role must be one that was recorded. Got 'plain'. Recorded: source, target."):
        run.word_map("circle", role="plain")


def test_layers_and_words_may_differ_from_step_to_step(writer):
    writer.write_step(0, {}, [record(0)])
    writer.write_step(1, {}, [record(1, layers=(4, 9), words=("circle", "left"))])
    writer.write_step(2, {}, [])
    run = written(writer)
    assert run.layers == (1, 4, 9)
    assert run.steps == (0, 1, 2)
    close(run.word_map("circle", layer=4), (lift(0)[1, :, 1] + lift(1)[0, :, 0]).mean(0) / 2)
    close(run.word_map("circle", layer=9), lift(1)[1, :, 0].mean(0))
    close(run.word_map("left"), lift(1)[:, :, 1].mean((0, 1)))
    close(run.word_frames("left"), np.array(record(1).word_frames)[:, :, 1].mean((0, 1)))
    with pytest.raises(UsageError, match="step of maps/vt must be one that was recorded. Got 2. Recorded: 0, 1."):
        run.word_map("circle", step=2)


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ({"word": "cat"}, "word must be one that was recorded. Got 'cat'. Recorded: red, circle."),
        ({"layer": 2}, "layer must be one that was recorded. Got 2. Recorded: 1, 4."),
        ({"step": 5}, "step must be one that was recorded. Got 5. Recorded: 0, 1."),
        ({"head": 3}, "head must be one that was recorded. Got 3. Recorded: 0, 1, 2."),
        ({"head": -1}, "head must be one that was recorded. Got -1. Recorded: 0, 1, 2."),
        ({"segment": 1}, "segment must be one that was recorded. Got 1. Recorded: 0."),
        ({"role": "source"}, "role must be one that was recorded. Got 'source'. Recorded: plain."),
        ({"direction": "tv"}, "map direction must be one that was recorded. Got 'tv'. Recorded: vt."),
    ],
)
def test_an_unknown_choice_is_answered_with_what_there_is(run, request_, said):
    with pytest.raises(UsageError) as caught:
        run.word_map(**({"word": "circle"} | request_))
    assert str(caught.value) == said
    assert isinstance(caught.value, WordError) == ("word" in request_)


def test_nothing_recorded_is_said(writer):
    writer.write_step(0, {}, [])
    run = written(writer)
    assert (run.words, run.layers, run.segments) == ((), (), ())
    with pytest.raises(UsageError, match="must have recorded attention to be read. Got none"):
        run.word_map("red")


def test_missing_array_is_said(writer):
    writer.write_step(0, {}, [record(mass=None)])
    with pytest.raises(
        UsageError, match="array must be one that was recorded. Got 'mass'. Recorded: word_frames, maps/vt"
    ):
        written(writer).mass()


def test_a_file_opens_with_plain_h5py_and_says_what_it_is(run):
    with h5py.File(run.path / "steps" / "step_0000.h5", "r") as file:
        data = file["segments/0/plain/maps/vt"]
        assert isinstance(data, h5py.Dataset)
        assert (data.dtype, data.chunks, data.compression, data.shuffle) == (np.uint8, (1, 1, 1, *GRID), "gzip", True)
        assert (data.attrs["encoding"], data.attrs["floor"]) == ("uint8_log2_lift", 2**-7)
        assert [axis.label for axis in data.dims] == ["layer", "head", "word", "frame", "row", "column"]
        lo, mass = file["segments/0/plain/maps/vt_lo"], file["segments/0/plain/mass"]
        assert isinstance(lo, h5py.Dataset)
        assert isinstance(mass, h5py.Dataset)
        assert (lo.shape, lo.dtype, mass.dtype, file.attrs["schema"]) == ((2, HEADS, 2), np.float32, np.float32, 1)


def test_reading_needs_no_torch(run):
    code = (
        "import sys; from probe.store import Run, list_runs; r = Run(sys.argv[1]); r.word_map('circle'); r.mass();"
        "r.resume(); list_runs('.'); assert not {'torch', 'diffusers', 'transformers', 'nnsight'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, run.path], check=True, timeout=60)


def test_video_is_found(run):
    assert run.video is None
    (run.path / "video.gif").write_bytes(b"")
    assert run.video == run.path / "video.gif"
    (run.path / "video.mp4").write_bytes(b"")
    assert run.video == run.path / "video.mp4"


def test_a_live_run_is_followed(writer):
    run = Run(writer.folder)
    assert (run.status, run.steps) == ("running", ())
    writer.write_step(0, {}, [record(0)])
    writer.flush()
    assert run.steps == (0,)
    close(run.word_map("red"), lift(0)[:, :, 0].mean((0, 1)))
    writer.write_step(0, {}, [record(5, words=("blue", "red"))])
    writer.flush()
    close(run.word_map("red"), lift(5)[:, :, 1].mean((0, 1)))
    assert run.words == ("blue", "red")
    writer.finish("done", frames=9)
    assert (run.status, run.info["frames"]) == ("done", 9)


def test_runs_are_listed_newest_first(tmp_path):
    first, second, third = (write_run(tmp_path / name, steps=0) for name in ("b", "c", "a"))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes.txt").write_text("no run")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "run.json").write_text("{")
    assert [run.path for run in list_runs(tmp_path)] == [third.path, second.path, first.path]
    with pytest.raises(StoreError, match="folder of runs must be readable. Got 'No such file or directory' for"):
        list_runs(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"role": "third"}, "segment role must be one of plain, source, target. Got 'third'. Use one of these."),
        ({"heads": "some"}, "heads must be one of each, mean. Got 'some'."),
        ({"maps": {"vv": lift(0)}}, "map direction must be one of vt, vt_text, tv, mean. Got 'vv'."),
        (
            {"maps": {"vt": lift(0)[:1]}},
            "maps vt must have the shape [2, any, 2, any, any, any]. Got [1, 3, 2, 2, 3, 4].",
        ),
        ({"heads": "mean"}, "maps vt must have the shape [2, 1, 2, any, any, any]. Got [2, 3, 2, 2, 3, 4]. Check"),
        ({"mass": np.zeros((2, 3, 4))}, "mass must have the shape [2, any, 3, 4]. Got [2, 3, 4]."),
        (
            {"word_frames": np.zeros((2, 3, 1, 2))},
            "word_frames must have the shape [2, any, 2, any]. Got [2, 3, 1, 2].",
        ),
        ({"words": ("red", "red")}, "layers and words must each be named once. Got (1, 4) and ('red', 'red')."),
        ({"tokens": {"text": ["a"]}}, "tokens must hold text, id, word, is_pad. Got text. Fill in all four."),
        (
            {"tokens": {"text": ["a"], "id": [1, 2], "word": [0], "is_pad": [False]}},
            "token arrays must have one length. Got {'text': (1,), 'id': (2,), 'word': (1,), 'is_pad': (1,)}.",
        ),
    ],
)
def test_a_record_that_does_not_fit_is_refused(changes, said):
    with pytest.raises(StoreError) as caught:
        record(**changes)
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda w: w.write_step(-1, {}, []), "step must be 0 or more. Got -1."),
        (
            lambda w: w.write_step(0, {}, [record(), record()]),
            "segments/0/plain must be written once in a step. Got it",
        ),
        (lambda w: w.write_step(0, {"x": object()}, []), "attribute x must be plain data. Got a value of type object."),
        (lambda w: w.write_step(0, {}, [], {"a/b": 1}), "resume names must be plain words. Got 'a/b'."),
        (lambda w: w.write_step(0, {}, [record(maps={"vt": lift(0) * np.nan})]), "map lift must be finite"),
        (lambda w: w.finish("ended"), "status must be done, failed or interrupted. Got 'ended'."),
        (lambda w: w.finish("done", schema=2), "run info must leave schema to the store."),
    ],
)
def test_what_cannot_be_written_is_refused_and_leaves_nothing(writer, call, said):
    with pytest.raises(StoreError) as caught:
        call(writer)
        writer.flush()
    assert str(caught.value).startswith(said)
    assert list((writer.folder / "steps").iterdir()) == []
    assert Run(writer.folder).status == "running"


def test_no_step_after_the_end(writer):
    writer.finish("done")
    with pytest.raises(StoreError, match="step 0 must come before the end of the run. Got it after."):
        writer.write_step(0, {}, [])
