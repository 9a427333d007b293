"""The recipe travels in the videos of a run, and makes the same video again."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from probe import film
from probe.comment import LONGEST, comment_of
from probe.errors import StoreError
from probe.store import Run
from recipes.language import parse
from tests import tiny
from tests.recipes.line import main_ok, refused

HARD = "a: 'b = c; # d \\ e'\nlist:\n  - \"ü 日本 🎈\"\n\\=;#\n"


def clip():
    return np.random.default_rng(0).integers(0, 255, (3, 32, 32, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def made(toy, tmp_path_factory):
    """A run of two prompts whose recipe has an include, a variable and overrides."""
    folder = tmp_path_factory.mktemp("made")
    prompts = f"prompts: {{source: {tiny.PROMPT}, target: {tiny.OTHER}}}"
    edit = "edits: [{op: transfer, source: source, prompts: [target], strength: '${much}'}]"
    (folder / "below.yaml").write_text(f"schema_version: 1\nname: x\n{prompts}\n{edit}\nvariables: {{much: 0.5}}\n")
    (folder / "mine.yaml").write_text("include: below.yaml\nname: mine\nsampler: {steps: 2, guidance: 3.0}\n")
    sets = ["--set", "much=0.25", "--set", "seed=5"]
    main_ok(["run", str(folder / "mine.yaml"), "-m", toy, *sets, "--out", str(folder / "run")])
    return Run(folder / "run")


@pytest.mark.parametrize("kind", ["mp4", "gif", "png"])
def test_a_text_comes_back_as_it_was(tmp_path, kind):
    path = tmp_path / f"a file.{kind}"
    write = {
        "mp4": lambda: film.save_mp4(path, clip(), 8, HARD),
        "gif": lambda: film.save_gif(path, clip(), 8, HARD),
        "png": lambda: film.contact_sheet(path, "title", [film.Row("row", clip())], HARD),
    }
    write[kind]()
    assert comment_of(path) == HARD


def test_a_file_without_a_text_has_an_empty_one(tmp_path):
    for path in film.save_video(tmp_path, clip(), 8):
        assert comment_of(path) == ""


def test_a_text_too_long_for_ffmpeg_stays_in_the_gif(tmp_path):
    mp4, gif = film.save_video(tmp_path, clip(), 8, comment="x" * (LONGEST + 1))
    assert (comment_of(mp4), len(comment_of(gif))) == ("", LONGEST + 1)


def test_every_file_of_a_run_carries_the_resolved_recipe(made):
    text = made.recipe
    assert "${" not in text
    assert "include: null" in text
    for name in ("video.mp4", "video.gif", "source.mp4", "source.gif", "contact.png"):
        assert comment_of(made.path / name) == text, name
    assert made.info["recipe_text"] == text
    assert parse.load(str(made.path / "recipe.yaml")).edits[0].strength == 0.25


@pytest.mark.parametrize("start", ["video.mp4", "source.gif", "contact.png", "."])
def test_it_runs_again_to_the_same_bits(made, tmp_path, start):
    main_ok(["run", str(made.path / start), "--out", str(tmp_path / "run")])
    again = Run(tmp_path / "run")
    assert torch.equal(*(torch.from_numpy(run.resume()[1]["latents"]) for run in (made, again)))
    for name in ("video.gif", "source.gif"):
        assert (again.path / name).read_bytes() == (made.path / name).read_bytes()
    assert again.recipe == made.recipe


def test_overrides_work_on_it_too(made, capsys):
    main_ok(["run", str(made.path / "video.gif"), "--set", "steps=4", "--dry-run", "--format", "json"])
    assert '"steps": 4' in capsys.readouterr().out


HOSTILE = {
    "": "A video must carry its recipe. Got none",
    "x" * 1_000_001: "A video must carry its recipe. Got more than 1,000,000 bytes",
    "schema_version: 1\nname: ../evil\nprompts: [a]": "name must",
    "include: ../../etc/passwd": "a path must stay inside of the recipe's folder",
    "!!python/object/apply:os.system [touch /tmp/evil]": "gif",
    "a: &a [x, x]\nb: &b [*a, *a, *a, *a, *a, *a, *a, *a, *a]\nc: [*b" + ", *b" * 300_000 + "]": "A video must carry",
}


@pytest.mark.parametrize("text", HOSTILE, ids=["none", "long", "name", "path", "tag", "bomb"])
def test_a_text_in_a_video_is_read_like_any_stranger(tmp_path, capsys, text):
    path = tmp_path / "video.gif"
    film.save_gif(path, clip(), 8, text)
    assert HOSTILE[text] in refused(capsys, ["run", str(path), "--out", str(tmp_path / "run")], 2)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["mp4", "gif", "png"])
def test_a_damaged_file_is_one_sentence(tmp_path, capsys, kind):
    path = tmp_path / f"video.{kind}"
    path.write_bytes(b"nonsense")
    with pytest.raises(StoreError, match="must be a readable mp4, GIF or PNG"):
        comment_of(path)
    assert "must be a readable mp4, GIF or PNG" in refused(capsys, ["run", str(path)], 1)


def test_a_picture_of_another_kind_is_not_opened(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "other.gif", format="BMP")
    with pytest.raises(StoreError, match="no picture"):
        comment_of(tmp_path / "other.gif")
