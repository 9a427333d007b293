"""Figures of a run: the numbers are those of the attention, the colours those of the numbers, the words clear."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from scipy.special import softmax

from probe import codec
from probe.errors import LayoutError, UsageError
from probe.readout.region_map import SpatialMap, TemporalMap, TextMap
from probe.site import Where
from probe.store import Run, RunWriter, SegmentRecord
from recipes import draw, figures
from recipes.catalogue import readouts
from recipes.figure import Choice
from recipes.job import prepare
from recipes.language import parse
from recipes.looks import region_maps
from tests import tiny
from tests.recipes.line import main_ok, refused

ERROR = float(codec.error_bound(np.array(-7), np.array(16))) + 2e-3  # of one byte, and of q and k in half precision
PROMPT = "a red cat on grass"  # "grass" is cut into three
STEPS, LAYERS, FRAMES, PATCHES, TEXT = 4, 3, 3, 16, tiny.TEXT


@pytest.fixture(scope="module")
def seen(toy, tmp_path_factory):
    """A run of the recipe, with Q and K of one call of its middle step."""
    folder = tmp_path_factory.mktemp("figures") / "run"
    sets = ["sampler.steps=4", "sampler.guidance=3", "record.keep_qk=[[2, 1]]"]
    main_ok(
        ["run", "ditctrl-visualize", "-m", toy, "-p", PROMPT, "--out", str(folder), *(f"--set={one}" for one in sets)]
    )
    return folder


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def drawn(seen, out, *more):
    main_ok(["figures", str(seen), "--out", str(out), *more])
    return {path.stem: np.load(path) for path in sorted(out.glob("*.npy"))}


def matrix(run):
    """The mean over heads of the attention that was kept, float64 [N, N]."""
    q, k = (array.astype(float) for array in run.qk(1, 2))
    return softmax(q @ k.swapaxes(-1, -2) / q.shape[-1] ** 0.5, -1).mean(0)


# --- numbers ---


def test_the_arrays_are_those_of_the_whole_matrix(seen, out):
    found = drawn(seen, out, "--layers", "1", "--padding", "--patch", "1,2")
    p, video = matrix(Run(seen)), slice(TEXT, None)
    frames = p[video, video].reshape(FRAMES, PATCHES, FRAMES, PATCHES)
    assert sorted(found) == [
        "spatial_frame_1_layer_1_step_2",
        "temporal_patch_1_2_layer_1_step_2",
        "text_layer_1_step_2",
        "tokens_layer_1_4_steps",
    ]
    close = {"rtol": ERROR}
    np.testing.assert_allclose(found["text_layer_1_step_2"], p[:TEXT, :TEXT], **close)
    np.testing.assert_allclose(found["spatial_frame_1_layer_1_step_2"], frames[1, :, 1], **close)
    np.testing.assert_allclose(found["temporal_patch_1_2_layer_1_step_2"], frames[:, 6, :, 6], **close)
    one = drawn(seen, out / "step", "--layers", "1", "--what", "tokens", "--step", "2")["tokens_layer_1_step_2"]
    cat = Run(seen).words.index("cat")
    np.testing.assert_allclose(one[cat].ravel(), p[video, 2] * p.shape[1], **close)


def test_text_is_drawn_without_its_padding_unless_it_is_asked_for(seen, out):
    run = Run(seen)
    real = int((~run.tokens()["is_pad"]).sum())
    assert real == 8  # four words in seven pieces, and the end
    (short,), (whole,) = (
        drawn(seen, out / str(i), "--what", "text", *more).values() for i, more in enumerate([(), ("--padding",)])
    )
    assert (short.shape, whole.shape) == ((real, real), (TEXT, TEXT))
    np.testing.assert_array_equal(whole[:real, :real], short)


def test_a_span_of_layers_is_their_mean_and_a_list_a_figure_each(seen, out):
    found = drawn(seen, out, "--what", "temporal", "--layers", "0-1,0,1,2")
    name = "temporal_patch_2_2_{}_step_2"
    mean, *each = (found[name.format(part)] for part in ("layers_0_to_1", "layer_0", "layer_1", "layer_2"))
    np.testing.assert_allclose(mean, (each[0] + each[1]) / 2, rtol=1e-6)
    (whole,) = drawn(seen, out / "all", "--what", "temporal").values()
    np.testing.assert_allclose(whole, np.mean(each, 0), rtol=1e-6)
    running = drawn(seen, out / "running", "--what", "temporal", "--layers", "cumulative")
    assert list(running) == [name.format("layers_0_to_1"), name.format("layers_0_to_2")]
    np.testing.assert_array_equal(running[name.format("layers_0_to_1")], mean)


def test_what_is_not_named_follows_the_step_and_the_frame(seen, out, capsys):
    assert [name.split("_")[0] for name in drawn(seen, out, "--step", "0")] == ["tokens"]
    assert "left out: text, spatial, temporal, recorded in other steps or frames only" in capsys.readouterr().out
    found = drawn(seen, out / "frame", "--frame", "0", "--step", "2")
    assert "left out: spatial, recorded" in capsys.readouterr().out
    assert [name.split("_")[0] for name in found] == ["temporal", "text", "tokens"]
    assert "tokens_frame_0_all_layers_step_2" in found


def test_a_story_is_drawn_by_segment(recorded, out):
    found = drawn(recorded, out, "--segment", "3")
    run = Run(recorded)
    assert list(found) == ["tokens_segment_3_all_layers_5_steps"]
    expected = [run.word_map(word, segment=3) for word in run.segment_words(3)]
    np.testing.assert_allclose(next(iter(found.values())), expected, rtol=1e-6)


# --- the authors' choices ---


def deep(folder, layers=30, grid=(13, 30, 45), **info):
    """A run as large as CogVideoX-2B that kept the temporal map of one frame pair only."""
    number = np.arange(2)
    record = SegmentRecord(
        segment=0,
        role="plain",
        attrs={"grid": list(grid), "prompt": 0, "mix": 0.0, "start_frame": 0},
        tokens={"text": ["a", "b"], "id": number, "word": number, "is_pad": number > 2},
        words=(),
        layers=tuple(range(layers)),
        metrics={"one": np.ones((layers, 1))},
    )
    with RunWriter.create(folder, {"prompts": ["a b"], **info}, "") as writer:
        writer.write_step(25, {}, [record])
    return Run(folder)


def test_the_authors_choices_are_theirs_at_their_size(tmp_path):
    chosen = figures.as_the_authors(deep(tmp_path / "run", steps=50), Choice())
    assert [(min(layers or ()), max(layers or ())) for layers in chosen.layers] == [(0, 15), (0, 20), (0, 25), (0, 29)]
    assert all(len(layers or ()) == max(layers or ()) + 1 for layers in chosen.layers)
    assert (chosen.step, chosen.word_frame, chosen.words) == (25, 10, 6)
    assert (chosen.scaling, chosen.padding, chosen.patch) == ("minmax", True, None)


def test_the_authors_choices_scale_to_a_smaller_run(seen, out):
    found = drawn(seen, out, "--authors")
    assert sorted(found) == [
        *(f"spatial_frame_1_layers_0_to_{end}_step_2" for end in (1, 2)),
        *(f"temporal_patch_2_2_layers_0_to_{end}_step_2" for end in (1, 2)),
        *(f"text_layers_0_to_{end}_step_2" for end in (1, 2)),
        *(f"tokens_frame_2_layers_0_to_{end}_step_2" for end in (1, 2)),
    ]
    assert found["text_layers_0_to_1_step_2"].shape == (TEXT, TEXT)
    assert found["tokens_frame_2_layers_0_to_1_step_2"].shape[0] == 5


# --- pictures ---


def colours(path):
    return np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)


def test_every_cell_has_the_colour_of_its_value():
    values = np.array([[0.0, 0.5], [1.0, 0.25]])
    legend = draw.Legend(draw.Scale(0, 1), "probability")
    axis = draw.Axis("token", {0: "a", 1: "b"})
    picture = np.asarray(draw.matrix("title", ["note"], values, (axis, axis), legend)).astype(int)
    expected = legend.paint(values).astype(int)
    places = [np.argwhere((picture == colour).all(-1)) for colour in expected.reshape(-1, 3)]
    cell = 120  # 240 pixels for two
    inside = [place[(np.abs(place - np.median(place, 0)) < cell / 2 - 1).all(1)] for place in places]
    assert all(len(place) >= (cell - 3) ** 2 for place in inside)
    centres = np.array([np.median(place, 0) for place in inside])
    assert np.abs(centres - centres[0] - [[0, 0], [0, cell], [cell, 0], [cell, cell]]).max() <= 1


def test_the_colours_end_at_the_smallest_and_the_largest_value_of_a_picture(seen, out):
    drawn(seen, out, "--what", "text,temporal")
    first, last = (draw.coloured(np.array(end), draw.VIRIDIS) for end in (0.0, 1.0))
    for path in out.glob("*.png"):
        seen_colours = colours(path)
        assert (seen_colours == first).all(1).sum() > 1000
        assert (seen_colours == last).all(1).sum() > 1000


def test_one_scale_for_all_figures_of_a_kind(seen, out):
    """The layer with the smaller values does not reach the last colour on a fixed scale, but does on its own."""
    last = draw.coloured(np.array(1.0), draw.VIRIDIS)
    values = drawn(seen, out / "own", "--what", "temporal", "--layers", "0,1,2")
    lower = min(values, key=lambda name: values[name].max())
    for scale in ("fixed", "log"):
        drawn(seen, out / scale, "--what", "temporal", "--layers", "0,1,2", "--scale", scale)
    reached = {name: (colours(out / name / f"{lower}.png") == last).all(1).sum() for name in ("own", "fixed", "log")}
    assert reached["own"] > 5000
    assert reached["fixed"] < 200  # the colour bar has it
    assert reached["log"] < 200


def test_each_frame_of_a_word_has_a_scale_of_its_own(seen, out):
    drawn(seen, out, "--what", "tokens")
    last = draw.coloured(np.array(1.0), draw.MAGMA)
    tile, bar = 28**2, 18 * 6
    count = (colours(next(out.glob("*.png"))) == last).all(1).sum()
    assert count >= 5 * FRAMES * tile
    drawn(seen, out / "fixed", "--what", "tokens", "--scale", "fixed")
    assert tile <= (colours(next((out / "fixed").glob("*.png"))) == last).all(1).sum() <= 2 * tile + bar


@pytest.mark.parametrize(("log", "places"), [(False, [0, 0.1, 1, 1]), (True, [0, 0.5, 1, 1])])
def test_a_scale(log, places):
    scale = draw.Scale(0.01 if log else 0, 1, log)
    np.testing.assert_allclose(scale.place(np.array([0.0, 0.1, 1.0, 5.0])), places, atol=1e-12)
    assert [round(scale.value(place), 6) for place in (0, 0.5, 1)] == ([0.01, 0.1, 1] if log else [0, 0.5, 1])


def test_a_logarithm_ends_after_four_decades_and_an_even_picture_has_one_colour():
    assert draw.Scale(0, 2, log=True).value(0) == pytest.approx(2e-4)
    assert draw.Scale(0, 0, log=True).place(np.zeros(2)).tolist() == [0, 0]
    assert draw.Scale(0.3, 0.3).place(np.full(2, 0.3)).tolist() == [0, 0]


@pytest.mark.parametrize("name", [draw.VIRIDIS, draw.MAGMA])
def test_colours_grow_lighter_for_eyes_that_see_no_colour(name):
    light = draw.coloured(np.linspace(0, 1, 64), name) @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(light) > 0).all()
    assert light[-1] - light[0] > 150


def test_tokens_are_labelled_as_people_write_them(seen):
    kind = figures.kinds_of(Run(seen), Choice(what=("text",)))["text"]
    assert list(kind.labels(8).values()) == ["a", "red", "cat", "on", "gr", "-as", "-s", "</s>"]


# --- what is recorded ---


def recipe(toy, **record):
    sets = [
        f"model={toy}",
        "sampler.steps=4",
        *(f"record.{name}={json.dumps(value)}" for name, value in record.items()),
    ]
    return prepare(parse.load("ditctrl-visualize", sets))


def test_the_recipe_records_the_middle_step_and_frame_or_others(toy):
    job = recipe(toy)
    assert (list(job.region_where().steps), job.region_frame()) == ([2], None)
    assert list(recipe(toy, steps=[0, 3]).region_where().steps) == [1]
    other = recipe(toy, region_steps=[1, 3], region_frame=2, heads="each")
    maps = [readout for readout in readouts(other) if isinstance(readout, TextMap | SpatialMap | TemporalMap)]
    assert [type(one) for one in maps] == [TextMap, SpatialMap, TemporalMap]
    assert all(list(one.where.steps) == [1, 2] and one.per_head for one in maps)
    assert maps[1].frame == 2
    with pytest.raises(LayoutError, match="A frame must lie in 0 to 2. Got 3. Count token frames"):
        recipe(toy, region_frame=3)
    with pytest.raises(UsageError, match="record.region_steps"):
        recipe(toy, region_steps=[3, 9])


def test_text_on_text_is_left_out_where_text_does_not_attend(toy):
    record = recipe(toy).recipe.record
    assert [type(one) for one in region_maps(record, Where(), None, {"self", "cross"})] == [SpatialMap, TemporalMap]


# --- refusals ---


def test_a_run_without_region_maps_says_how_to_record_them(recorded, capsys):
    said = refused(capsys, ["figures", str(recorded), "--what", "spatial"], 2)
    assert said.startswith(
        f"mmdit: A figure must show what was recorded. Got spatial for {recorded}, which has tokens."
    )
    assert "--set 'record.readouts=[text_text, spatial, temporal]', or run ditctrl-visualize." in said


def test_a_run_with_nothing_to_draw_says_so(tmp_path, capsys):
    said = refused(capsys, ["figures", str(deep(tmp_path / "run").path)], 2)
    assert "Got nothing to show" in said
    assert "which has no maps. Record it with" in said


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--step", "9"], "step must be one that was recorded. Got 9. Recorded: 0, 1, 2, 3."),
        (
            ["--what", "text", "--step", "1"],
            "step of regions/text_text must be one that was recorded. Got 1. Recorded: 2.",
        ),
        (["--layers", "3"], "layer must be one that was recorded. Got 3. Recorded: 0, 1, 2."),
        (["--layers", "1-x"], "Layers must be numbers, spans or cumulative. Got '1-x'. Write 3,5 for two figures"),
        (["--layers", "2-1"], "Layers must be numbers, spans or cumulative. Got '2-1'."),
        (["--layers", "0-1-2"], "Layers must be numbers, spans or cumulative. Got '0-1-2'."),
        (
            ["--what", "spatial", "--frame", "2"],
            "The frame of a spatial map must be the recorded one, 1. Got 2. Leave out",
        ),
        (["--frame", "3"], "A frame must lie in 0 to 2. Got 3. Count token frames, not pixel frames."),
        (["--patch", "4,0"], "A patch must be (row, column) in the grid 4x4. Got (4, 0). Count each from 0."),
        (["--patch", "4"], "--patch must be a row and a column. Got '4'. Write 15,22, each counted from 0."),
        (["--what", "tokens,maps"], "--what must be some of tokens,text,spatial,temporal. Got 'tokens,maps'."),
        (["--head", "0"], "head must be left out where maps hold the mean over heads. Got 0."),
        (["--segment", "1"], "segment must be one that was recorded. Got 1. Recorded: 0."),
        (
            ["--authors", "--step", "1"],
            "--authors must choose layers, step and frame itself. Got one of them. Leave it",
        ),
    ],
)
def test_what_cannot_be_drawn_is_said(seen, capsys, more, said):
    assert refused(capsys, ["figures", str(seen), *more], 2).startswith(f"mmdit: {said}")


def test_a_folder_that_cannot_be_written_is_said(seen, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    said = refused(capsys, ["figures", str(seen), "--what", "text", "--out", str(tmp_path / "file")], 1)
    assert said.startswith("mmdit: Figures must be written to disk. Got 'File exists'")


def test_programs_are_told_what_was_written(seen, out, capsys):
    main_ok(["figures", str(seen), "--what", "text", "--out", str(out), "--format", "json"])
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["figure"], row["shape"]) == ("text_all_layers_step_2", "8x8")
    assert {path.name for path in out.iterdir()} == {f"{row['figure']}.png", f"{row['figure']}.npy"}


def test_figures_lie_in_the_run_folder_by_default_and_change_nothing_else(seen, tmp_path):
    before = {path: path.read_bytes() for path in seen.rglob("*") if path.is_file()}
    main_ok(["figures", str(seen), "--what", "text"])
    after = {path: path.read_bytes() for path in seen.rglob("*") if path.is_file()}
    assert {path.parent.name for path in after.keys() - before.keys()} == {"figures"}
    assert all(after[path] == content for path, content in before.items())
