"""Recipes on families that run through their stock pipeline."""

import contextlib
import json

import numpy as np
import pytest
import torch

from probe.errors import UsageError
from probe.models.load import load
from probe.store import Run
from recipes.catalogue import interventions
from recipes.job import prepare
from recipes.language import parse
from recipes.run import execute
from tests import tiny
from tests.recipes.line import main_ok, refused
from tests.toys import flux, hunyuan, mochi, sd3, wan

CALLS = {
    "flux": {"height": 32, "width": 32, "max_sequence_length": 12},
    "wan": {"height": 32, "width": 32, "num_frames": 5},
    "sd3": {"height": 32, "width": 32, "max_sequence_length": 12},
    "mochi": {"height": 32, "width": 48, "num_frames": 7, "max_sequence_length": 12},
    "hunyuan": {"height": 32, "width": 32, "num_frames": 5},
}
SMALL = {name: ["--set", f"call={json.dumps(call)}"] for name, call in CALLS.items()}
FAST = ["--set", "steps=2", "--set", "guidance=3"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, toy in (("flux", flux), ("wan", wan), ("sd3", sd3), ("mochi", mochi), ("hunyuan", hunyuan)):
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


PROMPTS = {"source": tiny.PROMPT, "target": tiny.OTHER}
TAKE = {"op": "transfer", "tensors": "v", "source": "source", "prompts": ["target"], "rows": "video"}


def recipe(models, name, **more):
    data = {"schema_version": 1, "name": name, "model": str(models / name), "prompts": PROMPTS, "call": CALLS[name]}
    sampler = {"steps": 2, "guidance": 3.0}
    return parse.validate({**data, "sampler": sampler, "record": {"directions": ["vt"]}, **more}, name)


def batch(models, name, generators):
    """The stock pipeline's latents of both prompts."""
    call = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "latent"} | CALLS[name]
    made = load(str(models / name), device="cpu")(prompt=list(PROMPTS.values()), generator=generators, **call)
    return made[0].float().numpy()


def made_of(given, folder):
    """The run of a recipe; the toy decoder of Mochi has too few channels for a video."""
    with contextlib.suppress(*([RuntimeError] if given.name == "mochi" else [])):
        return execute(given, folder, quiet=True)
    return Run(folder)


@pytest.mark.filterwarnings("ignore:In CPU autocast")
@pytest.mark.parametrize("name", CALLS)
def test_prompts_make_one_batch_from_one_noise_and_edits_reach_the_target_alone(models, tmp_path, name):
    plain = made_of(recipe(models, name), tmp_path / "plain")
    latents = plain.resume()[1]["latents"]
    assert np.array_equal(latents, batch(models, name, [torch.Generator().manual_seed(0) for _ in PROMPTS]))
    made = made_of(recipe(models, name, edits=[TAKE]), tmp_path / "edited")
    edited = made.resume()[1]["latents"]
    assert np.array_equal(edited[0], latents[0])
    assert not np.array_equal(edited[1], latents[1])
    assert made.segments == ((0, "plain"), (1, "plain"))
    assert (made.segment_words(0)[2], made.segment_words(1)[2]) == ("cat", "dog")
    assert (made.path / "source.gif").is_file() == (name != "mochi")


def test_noise_of_their_own_is_the_stock_batch(models, tmp_path):
    sampler = {"steps": 2, "guidance": 3.0, "noise": "each"}
    made = execute(recipe(models, "wan", sampler=sampler), tmp_path / "run", quiet=True)
    assert np.array_equal(made.resume()[1]["latents"], batch(models, "wan", torch.Generator().manual_seed(0)))


@pytest.mark.parametrize(
    ("more", "got"),
    [
        ({"guides": [{"weight": 1, "perturb": [{"op": "seg"}]}]}, "guides"),
        ({"latents": [{"op": "nudge"}]}, "latents"),
    ],
)
def test_guides_and_latents_need_the_loop(models, more, got):
    with pytest.raises(UsageError, match=f"A recipe with {got} must have a model with a denoising loop of our own"):
        prepare(recipe(models, "wan", **more))


def test_positions_need_a_model_that_rotates(models):
    rotate = {"op": "rotate", "drop": True}
    assert interventions(prepare(recipe(models, "wan", edits=[rotate]))).handlers
    with pytest.raises(UsageError, match="edits.0 rotate: A change of positions must have a model that rotates"):
        interventions(prepare(recipe(models, "sd3", edits=[rotate])))


def test_an_interrupt_tells_what_is_there(models, tmp_path, monkeypatch, capsys):
    from probe import recorder
    from recipes import run

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    arguments = ["record", tiny.PROMPT, "-m", str(models / "wan"), *FAST, *SMALL["wan"], "--out", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        patch.setattr(run, "load", interrupted)
        assert "Interrupted before anything was written" in refused(capsys, arguments, 1)
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(recorder, "finish_video", interrupted)
    line = refused(capsys, arguments, 1)
    assert "2 finished steps stay readable in" in line
    assert line.endswith("Start the recipe again.")
    monkeypatch.setattr(run, "load", interrupted)
    assert "Interrupted before anything was written" in refused(capsys, [*arguments, "--force"], 1)
    assert Run(tmp_path / "run").steps == (0, 1)


@pytest.mark.parametrize("name", ["flux", "cogvideox"])
def test_a_run_says_how_its_changed_weights_were_computed(models, toy, tmp_path, name):
    recipe = tmp_path / "louder.yaml"
    recipe.write_text(
        f"schema_version: 1\nname: louder\nprompts: [{tiny.PROMPT}]\n"
        "edits: [{op: bias, amount: 1.0, columns: {words: [cat]}}]\n"
    )
    model = ["-m", toy] if name == "cogvideox" else ["-m", str(models / name), *SMALL[name]]
    main_ok(["run", str(recipe), *model, *FAST, "--out", str(tmp_path / "run")])
    (way, calls), *others = Run(tmp_path / "run").info["computed"].items()
    assert (way, others) == ("thin", [])
    assert calls == 2 * {"flux": flux.LAYERS, "cogvideox": 3}[name]


def test_a_run_of_no_finite_numbers_is_no_video(models, tmp_path, capsys):
    recipe = tmp_path / "loud.yaml"
    recipe.write_text(
        f"schema_version: 1\nname: loud\nprompts: [{tiny.PROMPT}]\nedits: [{{op: scale, tensor: o, factor: 1.0e300}}]\n"
    )
    line = ["run", str(recipe), "-m", str(models / "flux"), *SMALL["flux"], *FAST, "--out", str(tmp_path / "run")]
    assert "must be finite numbers after every step. Got NaN or infinity after step 0" in refused(capsys, line, 1)
    assert Run(tmp_path / "run").info["status"] == "failed"
