"""One number per layer and head, kinds of layers, what each key receives: written, read, or refused in a sentence."""

from __future__ import annotations

import h5py
import numpy as np
import pytest

from probe.errors import StoreError, UsageError
from probe.store import Run, RunWriter
from tests.probe.samples import HEADS, LAYERS, record

SHAPE = len(LAYERS), HEADS
NAN = float("nan")
PLACES = [(0, 0, "source"), (1, 0, "target"), (2, 1, "plain")]
ENTROPY = "Shannon entropy of a row, mean over rows, in nats, 0 to log(keys)"


@pytest.fixture
def writer(tmp_path):
    with RunWriter.create(tmp_path / "run", {}, "") as writer:
        yield writer


def written(writer, *records):
    for step, one in enumerate(records):
        writer.write_step(step, {}, [one])
    writer.flush()
    return Run(writer.folder)


def table(seed):
    return np.random.default_rng(seed).random(SHAPE).astype(np.float32)


def measured(seed, **changes):
    metrics = {"entropy": table(seed), "sink": table(seed + 10)}
    fields = {"metrics": metrics, "metric_info": {"entropy": ENTROPY}}
    return record(seed, **(fields | changes))


def test_metrics_come_back_one_by_one_and_as_means(writer):
    run = written(writer, measured(0), measured(1))
    assert run.metrics == ("entropy", "sink")
    assert run.metric_info == {"entropy": ENTROPY, "sink": ""}
    both = np.stack([table(0), table(1)]).astype(float)
    np.testing.assert_array_equal(run.metric_grid("entropy", 1), table(1))
    assert run.metric("entropy", step=1, layer=4, head=2) == both[1, 1, 2]
    assert run.metric("entropy") == pytest.approx(both.mean(), rel=1e-6)
    assert run.metric("entropy", step=0) == pytest.approx(both[0].mean(), rel=1e-6)
    assert run.metric("entropy", layer=1) == pytest.approx(both[:, 0].mean(), rel=1e-6)
    assert run.metric("entropy", head=1) == pytest.approx(both[:, :, 1].mean(), rel=1e-6)
    assert run.metric("sink", step=0, layer=1) == pytest.approx(table(10)[0].mean(dtype=float), rel=1e-6)


def test_what_is_not_defined_is_left_out_of_a_mean(writer):
    half, none = np.full(SHAPE, NAN), np.full(SHAPE, NAN)
    half[0, 0], half[0, 2] = 2, 4
    run = written(writer, *(measured(0, metrics={"iou": one}, metric_info={}) for one in (half, none)))
    assert run.metric("iou") == 3
    assert run.metric("iou", layer=1, head=2) == 4
    assert np.isnan(run.metric("iou", layer=4))
    assert np.isnan(run.metric("iou", step=1))
    np.testing.assert_array_equal(run.metric_grid("iou", 0), half.astype(np.float32))


def test_steps_weigh_the_same_however_many_layers_they_have(writer):
    bare = {"maps": {}, "words": (), "mass": None, "word_frames": None}
    few = record(0, layers=(4,), metrics={"sink": np.full((1, HEADS), 3)}, **bare)
    run = written(writer, record(0, metrics={"sink": np.ones(SHAPE)}), few)
    assert run.metric("sink") == 2
    assert run.metric("sink", layer=1) == 1


def test_metrics_of_segments_and_roles_are_kept_apart(writer):
    records = [measured(seed, segment=segment, role=role) for seed, segment, role in PLACES]
    writer.write_step(0, {}, records)
    writer.flush()
    run = Run(writer.folder)
    for seed, segment, role in PLACES:
        np.testing.assert_array_equal(run.metric_grid("entropy", 0, segment, role), table(seed))
        assert run.metric("sink", segment=segment, role=role, layer=1, head=0) == table(seed + 10)[0, 0]


def test_kinds_of_layers(writer):
    run = written(writer, record(0), record(1, layers=(4, 9), kinds=("joint", "single")))
    assert run.layer_kinds == {1: "joint", 4: "joint", 9: "single"}


def test_what_each_key_and_each_text_token_receives(writer):
    rng = np.random.default_rng(3)
    columns, mass = rng.random((*SHAPE, 28)).astype(np.float32), rng.random((*SHAPE, 4)).astype(np.float32)
    run = written(writer, record(0, columns=columns, token_mass=mass))
    np.testing.assert_allclose(run.columns(), columns.mean((0, 1)), rtol=1e-6)
    np.testing.assert_array_equal(run.columns(step=0, layer=4, head=1), columns[1, 1])
    np.testing.assert_allclose(run.token_mass(layer=1), mass[0].mean(0), rtol=1e-6)
    np.testing.assert_array_equal(run.token_mass(layer=1, head=2), mass[0, 2])


def test_masses_may_have_rows_that_are_not_defined(writer):
    """Video models with cross attention have no text rows."""
    mass = np.full((*SHAPE, 3, 4), NAN)
    mass[..., 2, :] = 0.25
    run = written(writer, record(0, mass=mass))
    assert np.isnan(run.mass()[:2]).all()
    assert (run.mass()[2] == 0.25).all()


def test_a_metric_says_in_the_file_what_it_is(writer):
    run = written(writer, measured(0))
    with h5py.File(run.path / "steps" / "step_0000.h5", "r") as file:
        data = file["segments/0/plain/metrics/entropy"]
        assert isinstance(data, h5py.Dataset)
        assert (data.shape, data.dtype, data.attrs["long_name"]) == (SHAPE, np.float32, ENTROPY)
        assert [axis.label for axis in data.dims] == ["layer", "head"]
        kinds = file["segments/0/plain/kinds"]
        assert isinstance(kinds, h5py.Dataset)
        assert list(kinds.asstr()[...]) == ["joint", "joint"]


def test_a_file_without_kinds_is_read_as_joint(writer):
    run = written(writer, record(0))
    with h5py.File(run.path / "steps" / "step_0000.h5", "a") as file:
        del file["segments/0/plain/kinds"]
    assert run.layer_kinds == {1: "joint", 4: "joint"}


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda run: run.metric("iou"), "metric must be one that was recorded. Got 'iou'. Recorded: entropy, sink."),
        (lambda run: run.metric_grid("iou", 0), "metric must be one that was recorded. Got 'iou'. Recorded: entropy,"),
        (lambda run: run.metric("sink", step=4), "step must be one that was recorded. Got 4. Recorded: 0."),
        (lambda run: run.metric("sink", layer=2), "layer must be one that was recorded. Got 2. Recorded: 1, 4."),
        (lambda run: run.metric("sink", head=3), "head must be one that was recorded. Got 3. Recorded: 0, 1, 2."),
        (lambda run: run.metric("sink", role="source"), "role must be one that was recorded. Got 'source'. Recorded"),
        (lambda run: run.metric_grid("sink", 0, segment=2), "segment must be one that was recorded. Got 2. Recorded"),
        (lambda run: run.columns(), "array must be one that was recorded. Got 'columns'. Recorded: mass, word_frames,"),
        (lambda run: run.token_mass(), "array must be one that was recorded. Got 'token_mass'. Recorded: mass, word"),
        (lambda run: run.attention_row(4, 0, token=0), "layer of query and key must be one that was recorded. Got 4."),
    ],
)
def test_what_was_not_recorded_is_answered_with_what_was(writer, call, said):
    run = written(writer, measured(0))
    with pytest.raises(UsageError) as caught:
        call(run)
    assert str(caught.value).startswith(said)


def test_a_run_without_metrics_says_so(writer):
    run = written(writer, record(0))
    assert (run.metrics, run.metric_info, run.qk_sites) == ((), {}, ())
    with pytest.raises(UsageError, match="metric must be one that was recorded. Got 'entropy'. Recorded: none."):
        run.metric("entropy")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"metrics": {"iou": np.zeros(2)}}, "metric iou must have the shape [2, any]. Got [2]."),
        ({"metrics": {"iou": np.zeros((3, HEADS))}}, "metric iou must have the shape [2, any]. Got [3, 3]."),
        ({"metrics": {"a/b": table(0)}}, "metric names must be plain words. Got 'a/b'. Leave out the slash."),
        ({"metric_info": {"iou": "x"}}, "metric with a definition must be one of none. Got 'iou'."),
        ({"kinds": ("joint", "triple")}, "kind of a layer must be one of joint, double, single, self, cross. Got 'tri"),
        ({"kinds": ("joint",)}, "kinds must have one entry per layer. Got ('joint',) for the layers (1, 4). Name each"),
        ({"columns": np.zeros((2, 28))}, "columns must have the shape [2, any, any]. Got [2, 28]."),
        ({"token_mass": np.zeros((1, HEADS, 4))}, "token_mass must have the shape [2, any, any]. Got [1, 3, 4]."),
    ],
)
def test_a_record_that_does_not_fit_is_refused(changes, said):
    with pytest.raises(StoreError) as caught:
        record(**changes)
    assert str(caught.value).startswith(said)


def test_damage_inside_a_large_table_is_named(writer):
    run = written(writer, measured(0, columns=np.random.default_rng(0).random((*SHAPE, 900))))
    path = run.path / "steps" / "step_0000.h5"
    with h5py.File(path, "r") as file:
        data = file["segments/0/plain/columns"]
        assert isinstance(data, h5py.Dataset)
        chunk = data.id.get_chunk_info(1)  # of the second layer
    whole = bytearray(path.read_bytes())
    whole[chunk.byte_offset : chunk.byte_offset + chunk.size] = b"\xff" * chunk.size
    path.write_bytes(whole)
    with pytest.raises(StoreError, match=f"step file must be whole. Got a damaged or unreadable {path} "):
        run.columns(layer=4)
    assert run.columns(layer=1).shape == (900,)
    assert run.metric("entropy") == pytest.approx(table(0).mean(dtype=float), rel=1e-6)
