"""The command line on a toy: what each command leaves behind."""

import inspect
import json

import numpy as np
import yaml
from diffusers import CogVideoXTransformer3DModel

from probe.store import Run
from tests import tiny
from tests.recipes.line import FAST, TWO, main_ok, refused

PASSES = 2 * 2 * (2 * 4 + 1 * 6) + 3 * 2 * (3 * 4)
"""Two sharing steps fork in the last of three layers; the other three evaluate each of four segments once."""


def test_a_story_leaves_a_whole_run_folder(recorded):
    run = Run(recorded)
    assert run.status == "done"
    assert run.steps == (0, 1, 2, 3, 4)
    assert {p.name for p in recorded.iterdir()} == {
        "run.json", "recipe.yaml", "video.mp4", "video.gif", "contact.png", "resume.h5", "steps"
    }  # fmt: skip
    assert run.segments == ((0, "plain"), (0, "source"), (1, "plain"), (1, "source"), (1, "target"), (2, "plain"),
                            (2, "source"), (2, "target"), (3, "plain"), (3, "target"))  # fmt: skip
    assert run.word_map("cat").shape == (3, 4, 4)
    assert run.word_map("dog", segment=3, step=0, layer=1, direction="tv").shape == (3, 4, 4)
    assert np.allclose(run.mass(step=2, segment=0).sum(-1), 1, atol=1e-5)
    step, resume = run.resume()
    assert step == 4
    assert resume["latents"].shape == (1, 6, 4, 8, 8)  # 3 + 3 strides of round(3 - 9 * 3 / 13)
    assert {"previous_x0", "generator", "timestep"} <= set(resume)
    assert run.info["prompts"] == [tiny.PROMPT, tiny.OTHER]
    assert run.info["sampler"]["class"] == "CogVideoXDPMScheduler"
    assert run.info["versions"]["torch"]


def test_the_recipe_in_the_folder_makes_the_same_video(recorded, tmp_path):
    main_ok(["run", str(recorded / "recipe.yaml"), "--out", str(tmp_path / "again")])
    assert np.array_equal(Run(recorded).resume()[1]["latents"], Run(tmp_path / "again").resume()[1]["latents"])
    assert (recorded / "video.gif").read_bytes() == (tmp_path / "again" / "video.gif").read_bytes()


def test_record(toy, tmp_path, capsys):
    out = str(tmp_path / "run")
    each = ["--set", "record.heads=each"]
    main_ok(["record", tiny.PROMPT, "--words", "cat, red", "-m", toy, *FAST, *each, "--out", out, "--format", "json"])
    assert json.loads(capsys.readouterr().out)["words"] == ["cat", "red"]
    run = Run(out)
    assert run.qk_sites == ((2, 1),)
    assert run.attention_row(1, 2, token=(0, 1, 2))[0].shape == (3, 4, 4)
    assert run.word_map("cat", head=1).shape == (3, 4, 4)
    stock = tiny.latents(tiny.pipeline(), steps=5)
    assert np.array_equal(run.resume()[1]["latents"], stock.numpy())


def test_dry_run_writes_nothing(toy, tmp_path, capsys):
    out = tmp_path / "run"
    main_ok(["run", "ditctrl", "-m", toy, *TWO, *FAST, "--out", str(out), "--dry-run", "--format", "json"])
    facts = json.loads(capsys.readouterr().out)
    assert not out.exists()
    assert facts["segments"] == 4
    assert facts["video frames"] == 21
    assert facts["shared steps"] == "[0, 2)"
    assert facts["run folder without the video, at most"].endswith(" MB")
    assert facts["shared layers"] == "[2, 3)"
    assert facts["layer passes"] == PASSES
    assert facts["layer passes of the pair loop"] == "180, of which this is 0.71"
    words, mass = 2 * 6 / 60, (12 * 60 + 3 * 16 * 16) / 60**2
    assert facts["extra attention for readouts"] == f"{words + mass:.1%}"


def test_predicted_layer_passes_are_those_made(recorded):
    assert Run(recorded).info["layer_passes"] == PASSES


def test_check_is_green_on_a_sound_model_and_red_on_a_broken_one(toy, tmp_path, capsys):
    main_ok(["check", toy, "--format", "json"])
    assert all(finding["passed"] for finding in json.loads(capsys.readouterr().out))
    pipe = tiny.pipeline()
    pipe.transformer.transformer_blocks[0].attn1.to_out[0].weight.data.zero_()
    pipe.save_pretrained(tmp_path / "broken")
    assert "no change from layer 0" in refused(capsys, ["check", str(tmp_path / "broken")], 1)


def test_recipes(capsys, tmp_path):
    main_ok(["recipes", "list", "--format", "json"])
    assert {"ditctrl", "record", "masactrl"} <= {row["name"] for row in json.loads(capsys.readouterr().out)}
    main_ok(["recipes", "show", "record"])
    shown = capsys.readouterr().out
    (tmp_path / "mine.yaml").write_text(shown)
    main_ok(["recipes", "validate", str(tmp_path / "mine.yaml")])
    assert "is a valid recipe" in capsys.readouterr().out
    main_ok(["recipes", "schema"])
    assert json.loads(capsys.readouterr().out)["properties"]["schema_version"]["const"] == 1


def test_doctor(capsys):
    main_ok(["doctor", "--format", "json"])
    facts = json.loads(capsys.readouterr().out)
    assert "error against float64" in facts["attention kernel"]
    assert facts["miniature"] == "there"


def test_the_shipped_recipes_are_what_they_say():
    from recipes.language import parse

    for name in parse.names():
        recipe = parse.load(name)
        assert recipe.name == name
        assert parse.validate(yaml.safe_load(parse.dump(recipe)), name) == recipe


def test_a_recording_of_cogvideox_2b_stays_under_a_gigabyte(tmp_path, capsys):
    """Predicted from its configuration alone, at the most words a run keeps by itself."""
    arguments = inspect.signature(CogVideoXTransformer3DModel.__init__).parameters.values()
    config = {a.name: a.default for a in arguments if a.default is not a.empty}
    (tmp_path / "transformer").mkdir()
    named = {"_class_name": "CogVideoXTransformer3DModel", **config}
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(named))
    index = {"_class_name": "CogVideoXPipeline", "transformer": ["diffusers", "CogVideoXTransformer3DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    prompt = " ".join(f"word{i}" for i in range(20))
    main_ok(["record", prompt, "-m", str(tmp_path), "--dry-run", "--format", "json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["tokens per segment"] == "226 text + 13x30x45 = 17776"
    assert facts["steps"] == 50
    megabytes = float(facts["run folder without the video, at most"].removesuffix(" MB"))
    assert 500 < megabytes < 1000
