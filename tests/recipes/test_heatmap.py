"""Word maps from the command line: numbers and pictures."""

import json

import imageio.v3 as iio
import numpy as np
import pytest

from probe.store import Run
from recipes import heatmap
from tests import tiny
from tests.recipes.line import FAST, main_ok, refused
from tests.toys import cogvideox


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
    main_ok(["maps", str(recorded), "--word", "Dog", "--format", "json"])
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


def test_each_token_frame_of_a_segment_has_a_pixel_frame_of_its_own(recorded):
    run = Run(recorded)
    whole = np.asarray(iio.imread(run.video))
    assert np.array_equal(heatmap.frames_of_segment(run, 3, 3), whole[[11, 15, 19]])
    assert np.array_equal(heatmap.frames_of_segment(run, 0, 3), whole[[0, 3, 7]])


def test_maps_without_ffmpeg_lie_on_the_gif(recorded, tmp_path, monkeypatch):
    monkeypatch.setattr("probe.film.has_ffmpeg", lambda: False)
    main_ok(["maps", str(recorded), "--word", "dog", "--out", str(tmp_path / "dog.png")])
    assert (tmp_path / "dog.png").stat().st_size > 1000


@pytest.mark.parametrize("extra", [["--export", "gif", "--out", "x.txt"], ["--out", "x"], ["--out", "x.pdf"]])
def test_an_export_of_no_kind(recorded, capsys, extra):
    assert "must be a file ending in .npz" in refused(capsys, ["maps", str(recorded), "--word", "dog", *extra], 2)


def test_reading_a_run_that_is_none(capsys, tmp_path):
    assert "run.json" in refused(capsys, ["maps", str(tmp_path)], 1)


def test_reading_an_unknown_word(capsys, recorded):
    assert "zebra" in refused(capsys, ["maps", str(recorded), "--word", "zebra"], 2)


def test_maps_of_two_latent_frames_a_token_lie_where_the_video_shows_them(tmp_path):
    """CogVideoX 1.5: two token frames a segment are four latent frames; the first of the video is not shown."""
    toy = tmp_path / "toy"
    cogvideox.pipeline(rotary=True, patch_size_t=2).save_pretrained(toy)
    prompts = ["-p", tiny.PROMPT, "-p", tiny.PROMPT]
    sets = ["--set", "segments.overlap=1", "--set", "segments.transitions=0"]
    main_ok(["run", "ditctrl", "-m", str(toy), *prompts, *FAST, *sets, "--out", str(tmp_path / "run")])
    run = Run(tmp_path / "run")
    first, then = (run.word_map("cat", segment=segment) for segment in (0, 1))
    assert first.shape[0] == 2
    assert run.segment_attrs(1)["start_frame"] == 3
    made = heatmap.choose(run, "cat", None, None, None, None, "vt").lift
    expected = [first[0], first[1], (first[1] + then[0]) / 2, then[0], then[1], then[1]]  # latent frames 1 to 6
    assert made.shape[0] == 6
    assert np.allclose(made, expected, atol=1e-6)
    assert len(heatmap.frames_of_segment(run, 1, 2)) == 2
