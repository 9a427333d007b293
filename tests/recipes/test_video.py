"""A given video from its file to the clips that were edited, and every way to get it wrong."""

from __future__ import annotations

import json
import shutil
from hashlib import sha256

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from PIL import Image

from control.adapter import Loop
from control.invert import encode
from probe.errors import RecipeError, StoreError, UsageError
from probe.store import Run
from recipes import run as running
from recipes.given import first_step, given_of
from recipes.job import prepare
from recipes.language import parse
from recipes.language.meaning import needs
from recipes.language.video import Video
from recipes.studio import Studio
from tests import tiny
from tests.recipes.line import main_ok, refused

COLORS = np.array([(250, 40, 30), (20, 30, 110), (240, 240, 40), (60, 160, 60)], np.uint8)
FRAMES = COLORS[np.random.default_rng(0).integers(0, 4, (24, 4, 5))].repeat(8, 1).repeat(8, 2)
"""24 frames of 40 x 32 pixels in blocks of 8."""

MINE = """
schema_version: 1
name: mine
prompts: {source: a red cat runs left, target: a blue cat runs left}
sampler: {scheduler: ddim, steps: 5, guidance: 3}
video: {file: clip.gif, start: 0.1, iterations: 20}
edits: [{op: transfer, source: source, prompts: [target], layers: {last: 1}}]
record: {words: [cat]}
output: {show: [source, target]}
"""


def film(path, frames):
    """A GIF, which keeps few colours exactly."""
    iio.imwrite(path, list(frames), plugin="pillow", loop=0, duration=100)
    return path


@pytest.fixture
def mine(toy, tmp_path):
    """A recipe and its video, 9 frames of 32 x 32, in a folder of their own."""
    film(tmp_path / "clip.gif", FRAMES[:9, :, :32])
    (tmp_path / "mine.yaml").write_text(MINE + f"model: {toy}\n", encoding="utf-8")
    return str(tmp_path / "mine.yaml")


@pytest.fixture(scope="module")
def edited(toy, tmp_path_factory):
    """A finished run, made from a file that is gone since."""
    folder = tmp_path_factory.mktemp("edited")
    film(folder / "clip.gif", FRAMES[:9, :, :32])
    (folder / "mine.yaml").write_text(MINE + f"model: {toy}\n", encoding="utf-8")
    main_ok(["run", str(folder / "mine.yaml"), "--out", str(folder / "run")])
    (folder / "clip.gif").rename(folder / "moved.gif")
    return folder / "run"


def asked(path, shape=(9, 32, 32), steps=10, **keys):
    return given_of(Video(file=str(path), **keys), ("source", "target"), shape, steps)


# --- reading ---------------------------------------------------------------------------------------------


def test_a_video_of_the_models_size_comes_as_it_is(tmp_path):
    path = film(tmp_path / "clip.gif", FRAMES[:9, :, :32])
    given = asked(path)
    assert (given.frames == FRAMES[:9, :, :32]).all()
    assert given.data == path.read_bytes()
    assert (given.name, given.prompt, given.step) == ("clip.gif", 0, 3)
    assert asked(path, prompt="target", start=0.5).prompt == 1


def test_first_and_every_choose_the_frames(tmp_path):
    path = film(tmp_path / "clip.gif", FRAMES[:, :, :32])
    assert (asked(path, fit="resize", first=3, every=2).frames == FRAMES[3:21:2, :, :32]).all()
    assert (asked(path, fit="resize").frames == FRAMES[:9, :, :32]).all()


def test_resizing_takes_the_mean_of_what_falls_together_and_cuts_the_sides(tmp_path):
    """40 x 32 to 16 x 16: the whole height, the middle 32 columns."""
    frames = COLORS[np.random.default_rng(1).integers(0, 4, (9, 32, 40))]
    given = asked(film(tmp_path / "clip.gif", frames), (9, 16, 16), fit="resize")
    middle = frames[:, :, 4:36].astype(float).reshape(9, 16, 2, 16, 2, 3).mean((2, 4))
    assert np.abs(given.frames - middle).max() <= 1
    larger = asked(tmp_path / "clip.gif", (9, 64, 64), fit="resize")
    assert larger.frames.shape == (9, 64, 64, 3)


def test_an_mp4_is_read(tmp_path):
    smooth = np.linspace(0, 255, 17)[:, None, None, None] + np.zeros((17, 32, 32, 3))
    path = tmp_path / "clip.mp4"
    iio.imwrite(path, smooth.round().astype(np.uint8), fps=8, plugin="FFMPEG", macro_block_size=2, quality=9)
    assert np.abs(asked(path, (17, 32, 32)).frames.astype(float) - smooth).max() < 8


@pytest.mark.parametrize(("start", "steps", "step"), [(0, 50, 1), (0.1, 50, 5), (0.1, 4, 1), (0.9, 4, 3), (0.9, 2, 1)])
def test_a_share_of_the_steps_is_left_out_and_never_all(start, steps, step):
    assert first_step(start, steps) == step


def broken(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    return tmp_path / name


@pytest.mark.parametrize(
    ("keys", "kind", "said"),
    [
        ({}, UsageError, "must have 9 frames of 32 x 32 pixels for this model. Got more of 40 x 32. Write video.fit"),
        ({"first": 16}, UsageError, r"Got 8 in clip.gif, one in 1 from frame 16 on. Give a longer one"),
        ({"every": 3, "fit": "resize"}, UsageError, r"must have 9 frames for this model. Got 8 in clip.gif, one in 3"),
        ({"fit": "resize", "steps": 1}, UsageError, "must have 2 steps or more. Got 1"),
    ],
)
def test_frames_that_do_not_fit_are_one_sentence(tmp_path, keys, kind, said):
    film(tmp_path / "clip.gif", FRAMES)
    with pytest.raises(kind, match=said):
        asked(tmp_path / "clip.gif", **keys)


@pytest.mark.parametrize("name", ["clip.mp4", "clip.gif", "clip.txt", "clip.png"])
@pytest.mark.parametrize("data", [b"", b"no video at all"])
def test_what_is_no_video_is_one_sentence(tmp_path, name, data):
    with pytest.raises(StoreError, match=rf"one that ffmpeg can read, or a GIF. Got {name}: .*Convert it to mp4"):
        asked(broken(tmp_path, name, data))


def test_a_video_that_breaks_off_is_one_sentence(tmp_path):
    whole = film(tmp_path / "whole.gif", FRAMES).read_bytes()
    with pytest.raises((StoreError, UsageError), match="Got .* in cut.gif|Got cut.gif: "):
        asked(broken(tmp_path, "cut.gif", whole[: len(whole) // 4]), fit="resize")


def test_a_video_that_is_gone_is_one_sentence(tmp_path):
    with pytest.raises(StoreError, match="must be a readable file. Got .*gone.mp4: No such file"):
        asked(tmp_path / "gone.mp4")


def test_without_ffmpeg_an_mp4_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("recipes.given.has_ffmpeg", lambda: False)
    with pytest.raises(StoreError, match=r"read by ffmpeg. Got clip.mp4 and none installed. pip install"):
        asked(broken(tmp_path, "clip.mp4", b"x"))


# --- the language ----------------------------------------------------------------------------------------


def test_a_recipe_names_a_file_of_its_folder_and_the_command_line_any(mine, tmp_path, monkeypatch):
    assert parse.load(mine).video.file == str((tmp_path / "clip.gif").resolve())
    other = tmp_path / "elsewhere"
    other.mkdir()
    film(other / "clip.gif", FRAMES)
    monkeypatch.chdir(other)
    assert parse.load(mine, ["video.file=clip.gif"]).video.file == str((other / "clip.gif").resolve())
    assert parse.load(mine, [f"video.file={tmp_path / 'clip.gif'}"]) == parse.load(mine)
    with pytest.raises(RecipeError, match=r"a video must be a file. Got no.mp4, which is none here"):
        parse.load(mine, ["video.file=no.mp4"])


def test_a_whole_path_counts_only_with_the_sha256_of_its_file(mine, tmp_path):
    """What `dump` writes loads from anywhere; a stranger's recipe that guesses a path reads nothing."""
    other, recipe = tmp_path / "other", parse.load(mine)
    other.mkdir()
    (other / "mine.yaml").write_text(text := parse.dump(recipe))
    assert parse.load(str(other / "mine.yaml")) == recipe
    assert recipe.video.sha256 == sha256((tmp_path / "clip.gif").read_bytes()).hexdigest()
    (other / "mine.yaml").write_text(text.replace(recipe.video.sha256, "null"))
    with pytest.raises(RecipeError, match="must stay inside of the recipe's folder"):
        parse.load(str(other / "mine.yaml"))
    (other / "mine.yaml").write_text(text.replace(recipe.video.sha256, "0" * 64))
    with pytest.raises(RecipeError, match=r"the one that its recipe was made for.* Got another in clip.gif"):
        parse.load(str(other / "mine.yaml"))
    film(tmp_path / "clap.gif", FRAMES[9:18, :, :32])
    newer = parse.load(str(other / "mine.yaml"), [f"video.file={tmp_path / 'clap.gif'}"])
    assert newer.video.sha256 != recipe.video.sha256


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("../clip.gif", "must stay inside of the recipe's folder"),
        ("clap.gif", r"must lead to a file. Got clap.gif, .* Did you mean clip.gif\?"),
    ],
)
def test_a_recipe_reaches_no_file_outside_of_its_folder(mine, tmp_path, name, said):
    text = (tmp_path / "mine.yaml").read_text().replace("clip.gif", name)
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(RecipeError, match=said):
        parse.load(mine)


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (["segments={}"], "video must be without segments"),
        (["windows={frames: 9}", "edits=[]"], "video must be without windows"),
        (["sampler.scheduler=dpm"], "sampler.scheduler must be ddim with a video"),
        (["sampler.scheduler=model"], "sampler.scheduler must be ddim with a video"),
        (["latents=[{op: nudge}]"], r"latents.0.op must be a blend with a video.* Got 'nudge'"),
        (["latents=[{op: renew}]"], r"latents.0.op must be a blend with a video"),
        (["video.prompt=sauce"], r"video.prompt must name a prompt. Got 'sauce'. Did you mean source\?"),
        (["video.start=1"], "video.start must be less than or equal to 0.9"),
        (["video.fit=stretch"], "video.fit must be 'refuse' or 'resize'"),
        (["video.iterations=0"], "video.iterations must be"),
        (["video.file=null"], "video.file must be a"),
    ],
)
def test_a_video_that_means_nothing_is_refused(mine, sets, said):
    with pytest.raises(RecipeError, match=said):
        parse.load(mine, sets)


def test_a_recipe_with_a_video_needs_our_own_loop(mine):
    assert "loop" in needs(parse.load(mine))


# --- runs ------------------------------------------------------------------------------------------------


def test_a_run_holds_its_video_and_what_was_seen_of_it(edited):
    run, info = Run(edited), json.loads((edited / "run.json").read_text())
    assert run.steps == (1, 2, 3, 4)
    assert run.word_map("cat", step=1).shape == (3, 4, 4)
    assert (edited / "video.input.gif").read_bytes() == (edited.parent / "moved.gif").read_bytes()
    assert info["video"] == "clip.gif, from step 1"
    assert "video.input.gif" in (edited / "recipe.yaml").read_text()
    assert str(edited.parent) not in (edited / "recipe.yaml").read_text()


def test_what_is_said_of_the_reconstruction_is_what_pixels_say(edited, toy):
    """Both ways back, by hand."""
    told = json.loads((edited / "run.json").read_text())["reconstruction"]
    loop = Loop(tiny.pipeline(), 5, 0, "ddim")
    frames = FRAMES[:9, :, :32]
    back = loop.decode(encode(loop, frames))[0].astype(float)
    assert told["autoencoder"] == pytest.approx(10 * np.log10(255**2 / ((back - frames) ** 2).mean()), abs=0.01)
    assert told["inversion"] == pytest.approx(told["autoencoder"], abs=0.05)
    assert told["forwards"] >= 4


def test_the_source_stays_the_video_and_others_take_from_it(mine):
    studio = Studio(mine)
    frames, loop = FRAMES[:9, :, :32], Loop(tiny.pipeline(), 5, 0, "ddim")
    video = encode(loop, frames)
    made = studio({}, 0).clips.latents
    assert torch.equal(made["source"], video)
    assert not torch.equal(made["target"], video)
    alone = studio({"edits": []}, 0).clips.latents
    assert torch.equal(alone["source"], video)
    assert not torch.equal(alone["target"], made["target"])
    drifting = studio({"video.follow": False}, 0).clips.latents
    assert not torch.allclose(drifting["source"], video, atol=1e-3)
    told = studio({"video.follow": False, "sampler.guidance": 1}, 0).clips.latents
    assert torch.allclose(told["source"], video, atol=1e-3)


def test_the_seed_changes_nothing_and_the_source_prompt_does(mine):
    studio = Studio(mine)
    one, other = (studio({"edits": []}, seed).clips.latents["target"] for seed in (0, 1))
    assert torch.equal(one, other)
    told = {"edits": [], "video.prompt": "target"}
    swapped = studio(told, 0).clips.latents
    video = studio({"edits": []}, 0).clips.latents["source"]
    assert torch.equal(swapped["target"], video)
    back = studio({**told, "video.follow": False, "sampler.guidance": 1}, 0).clips.latents
    far, near = ((back[name] - video).abs().max() for name in ("source", "target"))
    assert far > 3 * near


def test_a_run_folder_is_a_recipe_that_makes_the_same(edited, tmp_path):
    again = tmp_path / "again"
    main_ok(["run", str(edited), "--out", str(again)])
    assert (again / "video.gif").read_bytes() == (edited / "video.gif").read_bytes()
    assert (again / "recipe.yaml").read_bytes() == (edited / "recipe.yaml").read_bytes()
    main_ok(["run", str(again), "--out", str(again), "--force"])
    assert (again / "video.input.gif").read_bytes() == (edited / "video.input.gif").read_bytes()


def test_a_stopped_run_goes_on_to_the_same_video(mine, edited, tmp_path, monkeypatch, capsys):
    real, folder = running._on_step, tmp_path / "run"

    def stopping(loaded, recorder, bar):
        write = real(loaded, recorder, bar)

        def on_step(state):
            write(state)
            if state.step == 3:
                raise KeyboardInterrupt

        return on_step

    monkeypatch.setattr(running, "_on_step", stopping)
    assert "2 finished steps stay readable" in refused(capsys, ["run", mine, "--out", str(folder)], 1)
    monkeypatch.setattr(running, "_on_step", real)
    shutil.copytree(folder, tmp_path / "other")
    film(tmp_path / "other" / "video.input.gif", FRAMES[9:18, :, :32])
    said = "must be the one that its recipe was made for, of this sha256. Got another in video.input.gif"
    assert said in refused(capsys, ["resume", str(tmp_path / "other")], 2)
    main_ok(["resume", str(folder)])
    assert Run(folder).steps == (1, 2, 3, 4)
    assert (folder / "video.gif").read_bytes() == (edited / "video.gif").read_bytes()


def test_an_interrupt_while_a_video_is_inverted_leaves_no_folder(mine, tmp_path, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("recipes.inverted.invert", interrupted)
    assert "Interrupted before anything was written" in refused(capsys, ["run", mine, "--out", str(tmp_path / "r")], 1)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (["edits.0.steps=[0, 1]"], "edits.0 transfer: What acts or looks must have a step that the run makes, 1 to 4"),
        (["record.steps=[0, 1]"], "must have a step that the run makes, 1 to 4 of this video. Got WordMaps"),
        (["edits.0.source={stored: {step: 0}}"], "must have a step that the run makes, 1 to 4 of this video. Got Bank"),
    ],
)
def test_what_lies_in_steps_that_are_left_out_is_refused(mine, tmp_path, capsys, sets, said):
    line = ["run", mine, "--out", str(tmp_path / "run"), *(part for one in sets for part in ("--set", one))]
    assert said in refused(capsys, line, 2)
    assert not (tmp_path / "run").exists()


def test_the_dry_run_says_where_a_video_starts_and_the_run_how_near_it_came(mine, tmp_path, capsys):
    main_ok(["run", mine, "--dry-run", "--format", "json", "--set", "video.start=0.4"])
    said = json.loads(capsys.readouterr().out)
    assert said["video"] == "clip.gif, from step 2"
    assert said["layer passes of each step"] == "0 in 0 to 1, 12 in 2 to 4"
    main_ok(["run", mine, "--out", str(tmp_path / "run"), "--set", "edits=[]"])
    assert "autoencoder" in capsys.readouterr().out


def test_a_picture_of_one_prompt_is_a_recording_of_the_true_video(mine):
    made = Studio(mine)({"prompts": {"source": tiny.PROMPT}, "edits": [], "output": {}}, 0)
    assert torch.equal(made.clips.latents["source"], encode(Loop(tiny.pipeline(), 5, 0, "ddim"), FRAMES[:9, :, :32]))


def test_a_model_without_an_autoencoder_is_one_sentence(mine, toy, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(toy, bare)
    shutil.rmtree(bare / "vae")
    with pytest.raises(Exception, match="that edits a video must have an autoencoder. Got .*bare"):
        prepare(parse.load(mine, [f"model={bare}"]))


def test_the_shipped_video_is_small():
    path = parse.find("ditctrl-video-swap").parent / "circle.mp4"
    assert path.stat().st_size < 20_000
    with pytest.raises(OSError, match="cannot identify"):
        Image.open(path)
