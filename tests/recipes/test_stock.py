"""Recipes on families that run through their stock pipeline."""

import json

import numpy as np
import pytest
import torch

from probe.store import Run
from tests import tiny
from tests.recipes.line import main_ok, refused
from tests.toys import flux, wan

SMALL = {
    "flux": ["--set", "call={height: 32, width: 32, max_sequence_length: 12}"],
    "wan": ["--set", "call={height: 32, width: 32, num_frames: 5}"],
}
FAST = ["--set", "steps=2", "--set", "guidance=3"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, toy in (("flux", flux), ("wan", wan)):
        toy.pipeline().save_pretrained(folder / name)
    return folder


def recorded(models, name, out, *more):
    main_ok(["record", tiny.PROMPT, "-m", str(models / name), *FAST, *SMALL[name], *more, "--out", str(out)])
    return Run(out)


def test_a_picture_is_recorded(models, tmp_path):
    run = recorded(models, "flux", tmp_path / "run", "--set", "record.readouts=[frames, entropy, sinks]")
    assert run.word_map("cat", direction="tv").shape[0] == 1
    assert {"entropy_video", "sink_count", "text_mass"} <= set(run.metrics)
    assert set(run.layer_kinds.values()) == {"double", "single"}
    assert run.frames().shape == (1, 2)
    assert (tmp_path / "run" / "contact.png").is_file()
    assert run.info["status"] == "done"


def test_a_video_without_joint_attention_is_recorded(models, tmp_path):
    run = recorded(models, "wan", tmp_path / "run", "--set", "record.readouts=[frames, locality, tokens]")
    frames = run.word_map("cat").shape[0]
    assert run.frames().shape == (frames, frames)
    assert np.allclose(run.frames().sum(-1), 1, atol=1e-5)
    assert np.isnan(run.mass()[:2]).all()
    assert np.allclose(run.mass()[2].sum(), 1, atol=1e-5)
    assert np.allclose(run.token_mass().sum(-1), 1, atol=1e-4)


def test_the_recording_is_the_stock_pipelines_own_output(models, tmp_path):
    run = recorded(models, "wan", tmp_path / "run")
    stock = wan.pipeline()(
        prompt=tiny.PROMPT,
        height=32,
        width=32,
        num_frames=5,
        num_inference_steps=2,
        guidance_scale=3.0,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
    ).frames
    assert np.array_equal(run.resume()[1]["latents"], stock.numpy())


def test_a_dry_run_predicts_cost_and_bytes(models, capsys):
    arguments = ["record", tiny.PROMPT, "-m", str(models / "flux"), *FAST, *SMALL["flux"], "--dry-run"]
    main_ok([*arguments, "--format", "json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["tokens per segment"] == "12 text + 1x2x2 = 16"
    assert facts["run folder without the video, at most"].endswith("MB")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["run", "ditctrl", "-p", tiny.PROMPT, "-p", tiny.OTHER], "must have a model with a denoising loop of our own"),
        (["record", tiny.PROMPT, "--set", "scheduler=dpm"], "scheduler dpm"),
    ],
)
def test_what_needs_a_loop_of_our_own_is_refused(models, capsys, tmp_path, arguments, sentence):
    line = refused(capsys, [*arguments, "-m", str(models / "flux"), "--out", str(tmp_path / "run")], 2)
    assert sentence in line
    assert "Got FLUX" in line
    assert not (tmp_path / "run").exists()


def test_a_call_is_refused_where_the_loop_is_ours(toy, capsys, tmp_path):
    arguments = ["record", tiny.PROMPT, "-m", toy, "--set", "call={height: 32}", "--out", str(tmp_path / "run")]
    assert "must have no call for CogVideoX" in refused(capsys, arguments, 2)
