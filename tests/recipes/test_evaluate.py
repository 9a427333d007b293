"""`mmdit evaluate`: numbers of runs and files, on videos whose truth is known, and each way it can be refused."""

from __future__ import annotations

import csv
import io
import json
import shutil
from itertools import pairwise

import numpy as np
import pytest

from ditctrl import metric
from ditctrl.duration import shown
from ditctrl.motion import motion
from probe import film
from probe.errors import StoreError, UsageError, WordError
from probe.store import Run
from recipes import evaluate as evaluate_module
from recipes import features, footage, scene
from recipes.cut import Cut
from recipes.evaluate import evaluate, judge, scores
from recipes.job import prepare
from recipes.language import parse
from tests.recipes.line import FAST, main_ok, refused

RED, BLUE = "a red circle moving right on a white background", "a blue square moving right on a green background"


@pytest.fixture(scope="module")
def small():
    return features.load("miniature", device="cpu")


@pytest.fixture(scope="module")
def story():
    """17 frames that cut from RED to BLUE at frame 9."""
    red = scene.Thing("red", "circle", "right", 12.0, (16, 32), (48, 32))
    blue = scene.Thing("blue", "square", "right", 12.0, (16, 32), (48, 32))
    one, other = (scene.render(scene.Scene((thing,), ground)) for thing, ground in ((red, "white"), (blue, "green")))
    return np.concatenate([one[:9], other[9:]])


@pytest.fixture(autouse=True)
def _short_flow(monkeypatch):
    """Flow takes most of the time: where it is not what is looked at, that of three frames is enough."""
    monkeypatch.setattr(evaluate_module, "motion", lambda frames: motion(frames[:3]))


@pytest.fixture
def file(story, tmp_path):
    film.save_mp4(tmp_path / "story.mp4", story, 8)
    return tmp_path / "story.mp4"


@pytest.fixture(scope="module")
def found(small, story):
    return scores(story, [RED, BLUE], [(0, 9), (9, 17)], small, fps=8)


def test_a_cut_between_two_prompts_is_seen_as_what_it_is(found):
    (turn,) = found.turns
    assert turn["found"] == pytest.approx(9, abs=0.2)
    assert turn["meant_s"] == 9 / 8
    assert turn["sharpness"] > 0.8
    assert found.numbers["turn_error"] < 0.03
    assert found.numbers["text_margin"] > 0.2
    assert found.numbers["motion"] > 1
    assert found.numbers["still"] is False


def test_a_turn_at_another_place_than_meant_is_an_error_in_seconds(small, story):
    late = scores(story, [RED, BLUE], [(0, 11), (11, 17)], small, fps=4)
    assert late.numbers["turn_error"] == pytest.approx(2 / 4, abs=0.1)


def test_the_wrong_prompt_is_far_from_the_frames(small, story, found):
    wrong = scores(story, [BLUE, RED], [(0, 9), (9, 17)], small)
    assert wrong.numbers["text_margin"] == pytest.approx(-found.numbers["text_margin"])
    assert wrong.numbers["text"] < found.numbers["text"] - 0.3


def test_numbers_are_those_of_the_metrics(small, story, found):
    pooled, embedded = small.images(story)
    share = metric.shares([(0, 9), (9, 17)], 17)
    assert found.numbers["cscv"] == metric.cscv(pooled)
    assert found.numbers["text"] == pytest.approx(
        metric.text_similarity(embedded, small.texts([RED, BLUE]), share).mean()
    )


def test_a_prompt_that_comes_back_is_no_other_prompt(small, story, found):
    """Red, blue, red again: as red and blue alone."""
    again = np.concatenate([story, story[:9]])
    three = scores(again, [RED, BLUE, RED], [(0, 9), (9, 17), (17, 26)], small).numbers
    assert three["text_margin"] == pytest.approx(found.numbers["text_margin"], abs=0.05)
    assert three["text"] == pytest.approx(found.numbers["text"], abs=0.05)


def test_a_still_video_is_flagged(small, story):
    still = scores(np.repeat(story[:1], 5, 0), [RED], [(0, 5)], small)
    assert still.numbers["still"] is True
    assert still.numbers["cscv"] == pytest.approx(1)
    assert still.numbers["turn_error"] is None
    assert still.numbers["text_margin"] is None


def test_a_single_picture_has_only_what_is_defined(small, story):
    one = scores(story[:1], [RED], [(0, 1)], small).numbers
    assert one["cscv"] is None
    assert one["motion"] is None
    assert one["text"] > 0.3


def test_an_object_is_compared_with_itself_whatever_lies_behind_it(small, story):
    """The same circle on another background: the background changes, the object does not."""
    red = scene.Thing("red", "circle", "right", 12.0, (16, 32), (48, 32))
    there = [scene.render(scene.Scene((red,), ground)) for ground in ("white", "green")]
    frames = np.concatenate([there[0][:9], there[1][9:]])
    inside = scene.masks(scene.Scene((red,)))[0]
    seen = scores(frames, [RED], [(0, 17)], small, inside=inside).numbers
    assert seen["object"] > 0.99
    assert seen["background"] < 0.96  # half of the frames are as unlike the first as two backgrounds are, 0.8
    inside[1:] = False
    assert scores(frames, [RED], [(0, 17)], small, inside=inside).numbers["object"] is None


def test_an_object_that_changes_its_outline_is_not_the_same(small):
    things = [scene.Thing("red", shape, "right", 12.0, (16, 32), (48, 32)) for shape in ("circle", "square")]
    clips = [scene.render(scene.Scene((thing,))) for thing in things]
    masks = [scene.masks(scene.Scene((thing,)))[0] for thing in things]
    frames, inside = (np.concatenate([one[:9], other[9:]]) for one, other in (clips, masks))
    assert scores(frames, [RED], [(0, 17)], small, inside=inside).numbers["object"] < 0.98


def test_evaluate_gives_plain_numbers_of_a_run(recorded, small):
    run = Run(recorded)
    numbers = evaluate(run, small)
    assert numbers["frames"] == len(footage.read(run.video))
    assert all(value is None or isinstance(value, (bool, int, float)) for value in numbers.values())
    assert numbers["turn_error"] is not None
    assert numbers["object"] is None  # no word was named
    assert numbers == judge(run, small).numbers


def test_words_of_a_run_are_its_object(recorded, small):
    run = Run(recorded)
    word = run.words[-1]
    assert evaluate(run, small, [word])["background"] is not None
    with pytest.raises(WordError):
        evaluate(run, small, ["elephant"])


def test_a_mask_of_words_is_the_cut_map_in_pixels(recorded):
    run = Run(recorded)
    frames = footage.read(run.video)
    inside = footage.object_mask(run, run.words[-1:], frames)
    assert inside.shape == frames.shape[:3]
    segments = prepare(parse.load(str(recorded / "recipe.yaml"))).segments
    assert segments is not None
    tokens = footage.film.frames_of_tokens(len(frames), segments.frames)
    for one, other in pairwise(range(len(frames))):
        if tokens[one] == tokens[other]:
            assert np.array_equal(inside[one], inside[other])
    assert 0 < inside.mean() < 1
    both = footage.object_mask(run, run.words[-2:], frames)
    assert (both >= inside).all()


def test_prompts_of_a_story_are_shown_where_its_segments_show_them(recorded):
    job = prepare(parse.load(str(recorded / "recipe.yaml")))
    shot = footage.of_run(Run(recorded))
    assert job.segments is not None
    (_, stop), (start, end) = shot.spans
    latent = shown(job.segments)[0][1]
    assert stop == start == pytest.approx(4 * latent - 3)
    assert end == len(shot.frames) == job.pixel_frames
    assert shot.prompts == job.recipe.texts


def test_prompts_of_windows_change_halfway_between_their_windows():
    cut = Cut(13, 5, (0, 2, 4, 6, 8), (0, 0, 1, 1, 0), "uniform")
    assert footage.windows(cut) == [(0, (0, 5.5)), (1, (5.5, 9.5)), (0, (9.5, 13))]


def test_a_run_of_one_prompt_shows_it_throughout(toy, small, tmp_path):
    main_ok(["record", RED, "-m", toy, *FAST, "--out", str(tmp_path / "one")])
    shot = footage.of_run(Run(tmp_path / "one"))
    assert (shot.prompts, shot.spans) == ((RED,), ((0, len(shot.frames)),))


def test_without_ffmpeg_the_gif_is_read(file, story, monkeypatch):
    film.save_gif(file.with_suffix(".gif"), story[:5], 8)
    monkeypatch.setattr(film, "has_ffmpeg", lambda: False)
    assert len(footage.read(file)) == 5
    file.with_suffix(".gif").unlink()
    with pytest.raises(StoreError, match="pip install imageio-ffmpeg"):
        footage.read(file)


def test_a_file_is_read_with_its_rate_and_equal_parts(file):
    shot = footage.of_file(file, [RED, BLUE])
    assert (shot.fps, len(shot.frames)) == (8, 17)
    assert shot.spans == ((0, 8.5), (8.5, 17))
    with pytest.raises(UsageError, match="Give --prompt"):
        footage.of_file(file, [])


@pytest.mark.parametrize("content", [b"", b"nonsense" * 99, None])
def test_a_damaged_file_is_one_sentence(file, content):
    file.write_bytes(file.read_bytes()[:3000] if content is None else content)
    with pytest.raises(StoreError, match=r"A video must be readable\. Got .*\. Make it again"):
        footage.read(file)


def test_the_command_writes_tables_for_people_and_programs(file, capsys, tmp_path):
    main_ok(["evaluate", str(file), "-p", RED, "-p", BLUE])
    said = capsys.readouterr().out
    assert "cscv" in said
    assert "1 to 2" in said
    main_ok(["evaluate", str(file), "-p", RED, "-p", BLUE, "--format", "json", "--out", str(tmp_path / "a.csv")])
    (row,) = json.loads(capsys.readouterr().out)
    assert row["turns"][0]["found"] == pytest.approx(9, abs=0.5)
    (line,) = csv.DictReader(io.StringIO((tmp_path / "a.csv").read_text()))
    assert float(line["cscv"]) == row["cscv"]
    assert "turns" not in line


def test_one_bad_run_of_many_is_said_and_the_others_are_measured(recorded, stopped, tmp_path, capsys):
    for name, run in (("good", recorded), ("bad", stopped)):
        shutil.copytree(run, tmp_path / "all" / name)
    line = refused(capsys, ["evaluate", str(tmp_path / "all"), "--out", str(tmp_path / "a.json")], 1)
    assert "1 of 2 that could not" in line
    bad, good = json.loads((tmp_path / "a.json").read_text())
    assert "A run must have a video" in bad["error"]
    assert good["cscv"] > 0


def test_each_bad_request_is_one_sentence(stopped, file, tmp_path, capsys):
    assert "A run must have a video" in refused(capsys, ["evaluate", str(stopped)], 1)
    assert "Give --prompt" in refused(capsys, ["evaluate", str(file)], 2)
    assert "Check the path" in refused(capsys, ["evaluate", str(tmp_path / "none")], 1)
    assert "none of these" in refused(capsys, ["evaluate", str(file), "-p", RED, "--features", "what"], 1)
    assert "ending in .json, .csv" in refused(capsys, ["evaluate", str(file), "-p", RED, "--out", "a.txt"], 2)
