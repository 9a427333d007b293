"""Masks of words from the command line: measured, compared, written, refused."""

import json

import imageio.v3 as iio
import numpy as np
import pytest
from skimage.filters import threshold_otsu

from probe import mask
from probe.film import frames_of_tokens
from probe.store import Run
from recipes import heatmap
from recipes.maskfile import Rule
from tests import tiny
from tests.recipes.line import FAST, main_ok, refused


@pytest.fixture(scope="module")
def single(toy, tmp_path_factory):
    """A finished run of one prompt."""
    folder = tmp_path_factory.mktemp("runs") / "single"
    main_ok(["record", tiny.PROMPT, "-m", toy, *FAST, "--set", "record.heads=each", "--out", str(folder)])
    return folder


def told(capsys, *arguments):
    main_ok(["mask", *map(str, arguments), "--format", "json"])
    return json.loads(capsys.readouterr().out)


def written(capsys, path, *arguments):
    """The mask that a command writes."""
    told(capsys, *arguments, "--out", path)
    with np.load(path) as file:
        return file["mask"]


def overlap(a, b):
    return (a & b).sum() / (a | b).sum()


def test_a_mask_is_the_map_cut_by_otsu(single, tmp_path, capsys):
    found = written(capsys, tmp_path / "cat.npz", single, "--word", "Cat")
    lift = Run(single).word_map("cat")
    assert (found.dtype, found.shape) == (bool, (3, 4, 4))
    cut = threshold_otsu(lift.ravel())
    clear = np.abs(lift - cut) > np.ptp(lift) / 256  # but for the bin on which the threshold lies
    assert clear.sum() > 40
    assert np.array_equal(found[clear], (lift > cut)[clear])


def test_what_is_told_of_a_mask(single, tmp_path, capsys):
    facts = told(capsys, single, "--word", "cat", "--export", "npz", "--out", tmp_path / "cat.npz")
    found = np.load(tmp_path / "cat.npz")["mask"]
    assert facts["shape"] == "3x4x4"
    assert facts["mask"] == "cat · vt · segment 0 · mean of all layers, steps, heads · otsu, per clip"
    assert facts["share"] == pytest.approx(found.mean(), abs=1e-4)
    assert facts["share per frame"] == pytest.approx([frame.mean() for frame in found], abs=1e-4)
    assert facts["temporal iou"] == pytest.approx([overlap(found[f], found[f + 1]) for f in (0, 1)], abs=1e-4)
    assert facts["file"] == str(tmp_path / "cat.npz")
    assert "iou" not in facts


def test_options_reach_the_cut(single, tmp_path, capsys):
    lift = Run(single).word_map("cat", layer=1, step=2, head=1, direction="tv")
    place = ["--layer", 1, "--step", 2, "--head", 1, "--direction", "tv"]
    cut = ["--method", "threshold", "--value", 0.6, "--smooth", 0.5, "--per", "frame", "--largest"]
    found = written(capsys, tmp_path / "a.npz", single, "--word", "cat", *place, *cut)
    clean = mask.largest_component(mask.normalise(mask.smooth(lift, 0.5), "frame") > 0.6)
    assert np.array_equal(found, clean)
    assert 0 < found.sum() < (mask.normalise(mask.smooth(lift, 0.5), "frame") > 0.6).sum()
    above = written(
        capsys, tmp_path / "b.npz", single, "--word", "cat", "--method", "threshold", "--value", 1, "--per", "none"
    )
    assert np.array_equal(above, Run(single).word_map("cat") > 1)
    assert told(capsys, single, "--word", "cat", "--method", "top", "--value", 0.25)["share"] == 0.25


def test_frames_without_the_word_are_empty_and_do_not_move_the_threshold(recorded, capsys, tmp_path):
    lift = heatmap.choose(Run(recorded), "dog", None, None, None, None, "vt").lift
    shown = lift.any((1, 2))
    assert shown.tolist() == [False, False, True, True, True, True]
    found = written(capsys, tmp_path / "dog.npz", recorded, "--word", "dog")
    assert not found[~shown].any()
    assert np.array_equal(found[shown], mask.otsu(lift[shown]))
    assert not np.array_equal(found, mask.otsu(lift))
    assert told(capsys, recorded, "--word", "dog")["temporal iou"][0] is None


def test_a_word_that_is_nowhere_is_an_empty_mask():
    assert not Rule().cut(np.zeros((2, 3, 4), np.float32)).any()


def test_agreement_with_a_file_a_run_and_another_word(single, tmp_path, capsys):
    cat = written(capsys, tmp_path / "cat.npz", single, "--word", "cat")
    other = np.random.default_rng(0).random((3, 4, 4)) > 0.5
    np.savez(tmp_path / "other.npz", mask=other.astype(np.uint8))
    facts = told(capsys, single, "--word", "cat", "--against", tmp_path / "other.npz")
    assert facts["against"] == str(tmp_path / "other.npz")
    assert facts["iou"] == pytest.approx(overlap(cat, other), abs=1e-4)
    assert facts["iou per frame"] == pytest.approx([overlap(cat[f], other[f]) for f in range(3)], abs=1e-4)
    red = written(capsys, tmp_path / "red.npz", single, "--word", "red")
    facts = told(capsys, single, "--word", "cat", "--against-word", "red")
    assert (facts["against"], facts["iou"]) == (f"red in {single}", pytest.approx(overlap(cat, red), abs=1e-4))
    assert told(capsys, single, "--word", "cat", "--against", single)["iou"] == 1
    assert told(capsys, single, "--word", "cat", "--against", single, "--against-word", "red")["iou"] == facts["iou"]


def test_the_other_run_is_cut_alike(single, recorded, tmp_path, capsys):
    cut = ["--segment", 0, "--method", "top", "--value", 0.3]
    here = written(capsys, tmp_path / "here.npz", single, "--word", "cat", *cut)
    there = written(capsys, tmp_path / "there.npz", recorded, "--word", "cat", *cut)
    facts = told(capsys, single, "--word", "cat", *cut, "--against", recorded)
    assert facts["iou"] == pytest.approx(overlap(here, there), abs=1e-4)
    assert facts["iou"] < 1


def test_a_mask_is_drawn_over_its_patches(single, recorded, tmp_path, capsys):
    for run, word in ((single, "cat"), (recorded, "dog")):
        found = written(capsys, tmp_path / f"{word}.npz", run, "--word", word)
        told(capsys, run, "--word", word, "--out", tmp_path / f"{word}.gif")
        plain, drawn = (np.asarray(iio.imread(path))[..., :3] for path in (run / "video.gif", tmp_path / f"{word}.gif"))
        patches = found[frames_of_tokens(len(plain), len(found))].repeat(64, 1).repeat(64, 2)
        expected = plain * 0.4 + np.array([254, 232, 56]) * 0.6  # six tenths of cividis' brightest
        assert np.abs(drawn - expected)[patches].mean() < 8
        assert np.abs(drawn - plain.astype(float))[~patches].mean() < 8


@pytest.mark.parametrize("kind", ["png", "mp4"])
def test_pictures_of_a_mask(single, tmp_path, capsys, kind):
    facts = told(capsys, single, "--word", "cat", "--out", tmp_path / f"cat.{kind}")
    assert facts["file"] == str(tmp_path / f"cat.{kind}")
    assert (tmp_path / f"cat.{kind}").stat().st_size > 1000


def test_a_mask_lies_in_its_run_by_default(single, capsys):
    assert told(capsys, single, "--word", "cat", "--export", "npz")["file"] == str(single / "cat_vt_mask.npz")


def test_people_see_a_dash_where_nothing_is_defined(recorded, capsys):
    main_ok(["mask", str(recorded), "--word", "dog"])
    shown = capsys.readouterr().out
    assert "–, " in shown
    assert "None" not in shown


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["--word", "zebra"], 2, "zebra"),
        ([], 2, "Missing option '--word'"),
        (["--word", "cat", "--method", "top"], 2, "Got top with None. Give a threshold, or a share for top."),
        (["--word", "cat", "--value", "0.5"], 2, "Otsu must find its threshold itself"),
        (["--word", "cat", "--method", "top", "--value", "2"], 2, "must lie in 0 to 1, above 0. Got 2.0"),
        (["--word", "cat", "--smooth", "-1"], 2, "0 patches or more. Got -1.0"),
        (["--word", "cat", "--layer", "9"], 2, "layer must be one that was recorded. Got 9"),
        (["--word", "cat", "--out", "cat.csv"], 2, "must be a file ending in .npz, .gif, .mp4, .png. Got cat.csv"),
        (["--word", "cat", "--out", "/nowhere/cat.npz"], 1, "must be written to disk"),
        (["--word", "cat", "--against", "nowhere.npz"], 1, "must be a readable npz file. Got nowhere.npz"),
        (["--word", "cat", "--against", "nowhere"], 1, "run must be a folder. Got nowhere"),
        (["--word", "cat", "--against-word", "zebra"], 2, "zebra"),
        (["--word", "cat", "--against", "x.npz", "--against-word", "red"], 2, "--against-word must go with a run"),
    ],
)
def test_a_wrong_request_is_one_sentence(single, capsys, arguments, code, sentence):
    assert sentence in refused(capsys, ["mask", str(single), *arguments], code)


@pytest.mark.parametrize(
    ("content", "code", "sentence"),
    [
        (b"", 1, "must be a readable npz file"),
        (b"PK\x03\x04 cut off", 1, "must be a readable npz file"),
        (b"years of work", 1, "must be a readable npz file"),
        ({}, 1, "must hold an array named mask. Got no array"),
        ({"lift": np.ones((3, 4, 4)), "title": np.array("x")}, 1, "named mask. Got lift, title"),
        ({"mask": np.ones((3, 6, 4), bool)}, 2, "must lie on one grid. Got (3, 4, 4) and (3, 6, 4)"),
        ({"mask": np.ones((4, 4), bool)}, 2, "frames x rows x columns. Got bool (4, 4)"),
        ({"mask": np.full((3, 4, 4), 0.5)}, 2, "must be bool, frames x rows x columns. Got float64"),
        ({"mask": np.array([{"a": 1}])}, 1, "must be a readable npz file"),
    ],
)
def test_a_file_that_is_no_mask_is_one_sentence(single, capsys, tmp_path, content, code, sentence):
    path = tmp_path / "other.npz"
    path.write_bytes(content) if isinstance(content, bytes) else np.savez(path, **content)
    assert sentence in refused(capsys, ["mask", str(single), "--word", "cat", "--against", str(path)], code)


def test_a_plain_array_is_no_mask_file(single, capsys, tmp_path):
    with (tmp_path / "mask.npz").open("wb") as file:
        np.save(file, np.ones((3, 4, 4), bool))
    arguments = ["mask", str(single), "--word", "cat", "--against", str(tmp_path / "mask.npz")]
    assert "must be a readable npz file" in refused(capsys, arguments, 1)


def test_a_picture_needs_a_video(single, capsys, tmp_path):
    import shutil

    bare = shutil.copytree(single, tmp_path / "bare")
    for name in ("video.mp4", "video.gif"):
        (bare / name).unlink()
    line = refused(capsys, ["mask", str(bare), "--word", "cat", "--export", "png"], 2)
    assert "must have frames to lie on" in line
    assert told(capsys, bare, "--word", "cat", "--export", "npz")["share"] > 0
