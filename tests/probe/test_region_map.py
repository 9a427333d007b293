"""Region maps against the whole matrix in float64, on real calls of every family; in the run folder and back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import h5py
import numpy as np
import pytest
import torch

import probe
from probe import codec
from probe.errors import LayoutError, StoreError, UsageError
from probe.plan import Handler, Stage
from probe.readout import region_map
from probe.site import JOINT
from probe.store import Run, RunWriter
from tests import tiny
from tests.oracle import weights
from tests.probe.samples import GRID, HEADS, LAYERS, record
from tests.toys import cases, wan
from tests.toys.bench import Keep, bench_of, matrix, starts

BOUND = {torch.float64: 1e-6, torch.float32: 5e-6, torch.bfloat16: 2e-2}  # results are kept in float32
ERROR = float(codec.error_bound(np.array(-7), np.array(16)))  # of what one byte holds of probabilities


def parts(p: np.ndarray, rows: tuple[int, int], columns: tuple[int, int], text: int, grid: probe.Grid, frame: int):
    """The three maps of a matrix [H, N, M]; `rows` and `columns` are where text and video begin."""
    patches, found = grid.patches, {}
    found["text_text"] = p[:, rows[0] : rows[0] + text, columns[0] : columns[0] + text]
    here, there = (side[1] + frame * patches for side in (rows, columns))
    found["spatial"] = p[:, here : here + patches, there : there + patches]
    found["temporal"] = np.zeros((len(p), grid.frames, grid.frames, patches))
    for f, g, place in np.ndindex(grid.frames, grid.frames, patches):
        found["temporal"][:, f, g, place] = p[:, rows[1] + f * patches + place, columns[1] + g * patches + place]
    return found


def close(value: np.ndarray, expected: np.ndarray, bound: float) -> None:
    np.testing.assert_allclose(value.reshape(expected.shape), expected, rtol=bound, atol=1e-9)


@dataclass(eq=False)
class KeepCalls(Handler):
    where: probe.Where = field(default_factory=probe.Where)
    stage = Stage.USED

    def begin(self, prompts: Any, steps: int, layers: int) -> None:
        self.calls: dict[tuple[int, int], Any] = {}

    def serve(self, call: Any, rows: tuple[int, ...]) -> None:
        self.calls[call.site.step, call.site.layer] = call


@pytest.mark.parametrize("dtype", BOUND)
def test_region_maps_equal_the_matrix(dtype, monkeypatch):
    monkeypatch.setattr(region_map, "_CHUNK", 5)  # several chunks, the last one shorter
    readouts = [kind(per_head=True) for kind in (probe.TextMap, probe.SpatialMap, probe.TemporalMap)]
    keep = KeepCalls()
    tiny.latents(probe.trace(tiny.pipeline(rotary=True, dtype=dtype), keep, *readouts), steps=2)
    for readout in readouts:
        assert len(readout.values) == 2 * 3
        for at, value in readout.values.items():
            call = keep.calls[at.step, at.layer]
            p = weights(call.q, call.k)[call.branches.index(at.branch)].numpy()
            text = call.layout.text
            expected = parts(p, (0, text), (0, text), text, call.layout.grid, 1)[readout.stored]
            close(value, expected, BOUND[dtype])


def test_the_mean_over_heads_is_kept_unless_each_is_asked_for():
    kinds = (probe.TextMap, probe.SpatialMap, probe.TemporalMap)
    means, each = [kind() for kind in kinds], [kind(per_head=True) for kind in kinds]
    tiny.latents(probe.trace(tiny.pipeline(), *means, *each), steps=1)
    shapes = [next(iter(readout.values.values())).shape for readout in means]
    assert shapes == [(1, 12, 1, 1, 12), (1, 16, 1, 4, 4), (1, 3, 3, 4, 4)]
    for mean, apart in zip(means, each, strict=True):
        for at, value in mean.values.items():
            np.testing.assert_allclose(value[0], apart.values[at].mean(0), rtol=1e-5)


def test_another_frame_can_be_chosen_and_one_that_is_not_there_is_said():
    first, last = probe.SpatialMap(frame=0), probe.SpatialMap(frame=2)
    middle, named = probe.SpatialMap(), probe.SpatialMap(frame=1)
    tiny.latents(probe.trace(tiny.pipeline(), first, last, middle, named), steps=1)
    values = [next(iter(readout.values.values())) for readout in (first, last, middle, named)]
    assert not np.allclose(values[0], values[1], rtol=1e-3)
    assert np.array_equal(values[2], values[3])
    with pytest.raises(LayoutError, match="A frame must lie in 0 to 2. Got 3. Count token frames"):
        tiny.latents(probe.trace(tiny.pipeline(), probe.SpatialMap(frame=3)), steps=1)
    with pytest.raises(UsageError, match="The frame of a spatial map must be 0 or more. Got -1."):
        probe.SpatialMap(frame=-1)


@pytest.mark.filterwarnings("ignore:In CPU autocast")
@pytest.mark.parametrize("case", cases(), ids=str)
def test_in_every_family(case):
    """Text on text where text attends; a frame and a patch in joint and in self attention; one frame in pictures."""
    bench, keep = bench_of(case), Keep()
    joint = bool(bench.family.kinds & JOINT)
    readouts = [probe.SpatialMap(per_head=True), probe.TemporalMap(per_head=True)]
    readouts += [probe.TextMap(per_head=True)] if joint else []
    assert torch.equal(bench.latents(keep, *readouts), bench.plain)
    for readout in readouts:
        assert readout.values
        for at, value in readout.values.items():
            call, row = keep.found(at)
            grid, (text_row, text_column, video) = call.layout.grid, starts(call)
            seen = value.shape[-1] if readout.stored == "text_text" else 0
            expected = parts(
                matrix(call, row).numpy(), (text_row, video), (text_column, video), seen, grid, grid.frames // 2
            )
            close(value, expected[readout.stored], 1e-4)
    if not joint:
        with pytest.raises(probe.MmditError, match="must select attention of a kind it can read. Got TextMap"):
            bench.latents(probe.TextMap())


# --- in the run folder ---

TOKENS, PATCHES, FRAMES = 4, GRID[1] * GRID[2], GRID[0]
SHAPES = {
    "text_text": (TOKENS, 1, 1, TOKENS),
    "spatial": (PATCHES, 1, *GRID[1:]),
    "temporal": (FRAMES, *GRID),
}
MEANS = {"text_text": {"heads": "mean"}, "spatial": {"heads": "mean", "frame": 1}, "temporal": {"heads": "mean"}}
EACH = {name: said | {"heads": "each"} for name, said in MEANS.items()}


def chances(seed: int, heads: int = 1) -> dict[str, np.ndarray]:
    """Probabilities between 2**-23 and 1."""
    rng = np.random.default_rng(seed)
    return {name: 2.0 ** rng.uniform(-23, 0, (len(LAYERS), heads, *shape)) for name, shape in SHAPES.items()}


def kept(folder, *records) -> Run:
    with RunWriter.create(folder, {}, "") as writer:
        for step, one in enumerate(records):
            writer.write_step(step, {}, [one])
    return Run(folder)


def test_they_come_back_from_the_run_folder(tmp_path):
    made = [chances(0), chances(1)]
    run = kept(tmp_path / "run", *(record(i, regions=one, region_facts=MEANS) for i, one in enumerate(made)))
    assert run.region_maps() == dict.fromkeys(("text_text", "spatial", "temporal"), (0, 1))
    assert run.spatial_frame() == 1
    read = {"text_text": run.text_text, "spatial": run.spatial, "temporal": lambda **at: run.temporal((2, 3), **at)}
    shapes = {"text_text": (4, 4), "spatial": (12, 3, 4), "temporal": (2, 2)}
    for name, found in read.items():
        written = [one[name][..., 2, 3] if name == "temporal" else one[name] for one in made]
        one, mean = found(step=1, layer=4), found()
        assert (one.dtype, one.shape) == (np.float32, shapes[name])
        np.testing.assert_allclose(one, written[1][1, 0].reshape(shapes[name]), rtol=ERROR)
        np.testing.assert_allclose(mean, np.mean(written, (0, 1, 2)).reshape(shapes[name]), rtol=ERROR)


def test_heads_apart_and_their_mean(tmp_path):
    made = chances(0, HEADS)
    run = kept(tmp_path / "run", record(regions=made, region_facts=EACH))
    np.testing.assert_allclose(run.spatial(layer=1, head=2)[:, None], made["spatial"][0, 2], rtol=ERROR)
    np.testing.assert_allclose(run.text_text(), made["text_text"].mean((0, 1))[:, 0, 0], rtol=ERROR)


def test_what_is_too_small_is_nothing_and_a_whole_row_survives(tmp_path):
    made = chances(0)
    made["text_text"][:] = 2.0**-24
    made["text_text"][..., 2] = 1.0
    found = kept(tmp_path / "run", record(regions=made, region_facts=MEANS)).text_text()
    assert found.tolist() == [[0, 0, 1, 0]] * TOKENS


def test_a_step_file_says_what_a_region_map_is(tmp_path):
    said = {"other_kinds": {"spatial": "self"}, "kinds": ("cross", "cross")}
    run = kept(tmp_path / "run", record(regions=chances(0), region_facts=MEANS, **said))
    with h5py.File(run.path / "steps" / "step_0000.h5", "r") as file:
        data = file["segments/0/plain/regions/spatial"]
        assert isinstance(data, h5py.Dataset)
        assert (data.shape, data.dtype, data.attrs["unit"], data.attrs["frame"]) == (
            (2, 1, 12, 1, 3, 4),
            np.uint8,
            2**-16,
            1,
        )
        assert (data.attrs["kind"], data.attrs["heads"]) == ("self", "mean")
        assert [axis.label for axis in data.dims] == ["layer", "head", "looking", "frame", "row", "column"]


def test_self_attention_beside_cross_attention_is_told_apart(tmp_path):
    """Words are seen in Wan's cross attention, patches in its self attention."""
    readouts = [probe.SpatialMap(), probe.TemporalMap()]
    call = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2}
    run = probe.record(wan.pipeline(), tiny.PROMPT, ["cat"], tmp_path / "run", readouts=readouts, **call)
    head = run.index.head(1).segments[0, "plain"]
    assert set(head.kinds) == {"cross"}
    assert head.other_kinds == {"regions/spatial": "self", "regions/temporal": "self"}
    assert run.region_maps() == {"spatial": (0, 1), "temporal": (0, 1)}
    frames, height, width = run.segment_attrs()["grid"]
    assert run.spatial().shape == (height * width, height, width)
    assert 0 < run.spatial().reshape(height * width, -1).sum(-1).max() < 1
    assert run.temporal((1, 0)).shape == (frames, frames)


def test_a_run_without_them_reads_as_before(tmp_path):
    run = kept(tmp_path / "run", record())
    assert run.region_maps() == {}
    assert run.word_map("red", layer=1, step=0).shape == GRID
    with pytest.raises(UsageError, match="region map must be one that was recorded. Got 'spatial'. Recorded: none."):
        run.spatial()


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda run: run.spatial(step=3), "step must be one that was recorded. Got 3. Recorded: 0."),
        (lambda run: run.text_text(layer=2), "layer must be one that was recorded. Got 2. Recorded: 1, 4."),
        (lambda run: run.spatial(head=0), "head must be left out where maps hold the mean over heads. Got 0."),
        (lambda run: run.temporal((3, 0)), "A patch must be (row, column) in the grid 3x4. Got (3, 0). Count each"),
        (lambda run: run.temporal((0, -1)), "A patch must be (row, column) in the grid 3x4. Got (0, -1)."),
        (lambda run: run.temporal((1,)), "A patch must be (row, column) in the grid 3x4. Got (1,)."),
        (lambda run: run.text_text(segment=1), "segment must be one that was recorded. Got 1. Recorded: 0."),
    ],
)
def test_what_is_not_there_is_said(tmp_path, call, said):
    run = kept(tmp_path / "run", record(regions=chances(0), region_facts=MEANS))
    with pytest.raises(UsageError) as caught:
        call(run)
    assert str(caught.value).startswith(said)


def bad(**changes: np.ndarray) -> dict[str, Any]:
    return {"regions": chances(0) | changes, "region_facts": MEANS}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (bad(text=np.zeros((2, 1, 4, 1, 1, 4))), "region map must be one of text_text, spatial, temporal. Got 'text'."),
        (bad(spatial=np.zeros((2, 1, 4, 4))), "region map spatial must have the shape [2, 1, any, any, any, any]."),
        (bad(spatial=chances(0, 3)["spatial"]), "region map spatial must have the shape [2, 1, any, any, any, any]."),
    ],
)
def test_a_record_that_does_not_fit_is_refused(changes, said):
    with pytest.raises(StoreError) as caught:
        record(**changes)
    assert str(caught.value).startswith(said)


def test_values_that_are_no_probabilities_are_refused(tmp_path):
    made = chances(0)
    made["temporal"][0, 0, 1, 1, 2, 3] = np.nan
    with pytest.raises(StoreError, match="map lift must be finite and at least 0. Got 1 NaN."):
        kept(tmp_path / "run", record(regions=made, region_facts=MEANS))


def test_damage_inside_one_of_them_is_named_and_the_others_are_read(tmp_path):
    made = {name: np.repeat(one, 40, 2) for name, one in chances(0).items()}
    run = kept(tmp_path / "run", record(regions=made, region_facts=MEANS))
    path = run.path / "steps" / "step_0000.h5"
    with h5py.File(path, "r") as file:
        data = file["segments/0/plain/regions/spatial"]
        assert isinstance(data, h5py.Dataset)
        chunk = data.id.get_chunk_info(1)  # of the second layer
    whole = bytearray(path.read_bytes())
    whole[chunk.byte_offset : chunk.byte_offset + chunk.size] = b"\xff" * chunk.size
    path.write_bytes(whole)
    with pytest.raises(StoreError, match=f"step file must be whole. Got a damaged or unreadable {path} "):
        run.spatial(layer=4)
    assert run.spatial(layer=1).shape == (480, 3, 4)
    assert run.temporal((0, 0)).shape == (80, 2)
