"""Several prompts in lockstep: a recipe makes what the same program written by hand makes, and its folder says so."""

from __future__ import annotations

import json

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from PIL import Image

import control
import probe
from control.adapter import Loop
from control.closed_form import Identity
from control.denoise import Lockstep, State, denoise
from control.fork import Fork
from control.guide import Guide
from control.latent import Blend
from control.noise import LowPass, renew
from probe.models.load import load
from probe.site import Which
from probe.store import Run
from recipes.language import parse
from recipes.run import execute
from tests import tiny
from tests.oracle import JointCalls, patched_attention
from tests.recipes.line import main_ok, refused

STEPS = 4
PROMPTS = {"source": tiny.PROMPT, "target": tiny.OTHER}
TAKE = {"op": "transfer", "source": "source", "prompts": ["target"], "steps": [1, 3], "layers": {"only": [0, 2]}}
WORDS = {"words": ["cat", "dog"]}


def recipe(model, **more):
    data = {"schema_version": 1, "name": "edit", "model": model, "prompts": PROMPTS, "record": WORDS}
    return parse.validate({**data, "sampler": {"steps": STEPS, "guidance": 3.0}, **more}, "edit")


def latents_of(run):
    return torch.from_numpy(run.resume()[1]["latents"])


def run_of(folder, model, **more):
    return execute(recipe(model, **more), folder / "run", quiet=True)


@pytest.fixture(scope="module")
def edited(toy, tmp_path_factory):
    """A transfer of keys and values, recorded."""
    return run_of(tmp_path_factory.mktemp("runs"), toy, edits=[TAKE])


@pytest.fixture(autouse=True)
def without_mp4(monkeypatch):
    """Quicker; the run of `edited` has them."""
    monkeypatch.setattr("probe.film.has_ffmpeg", lambda: False)


def stock(model, **more):
    """The stock pipeline's batch of both prompts, each from the same noise."""
    call = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "output_type": "latent"}
    generators = [torch.Generator().manual_seed(0) for _ in PROMPTS]
    return load(model, device="cpu")(prompt=list(PROMPTS.values()), generator=generators, **call, **more).frames


def by_hand(model, handlers=(), latents=(), again=None, **lockstep):
    """The same loop without a recipe."""
    pipe = load(model, device="cpu")
    loop = Loop(pipe, STEPS, 0)
    text = loop.encode(list(PROMPTS.values()))
    noise = State.start(loop, 2, loop.clip_frames, text.dtype)

    def drive(clock):
        predict = Lockstep(loop, text, loop.encode(["", ""]), lambda timestep: 3.0, clock, **lockstep)
        done = denoise(loop, predict, noise, edits=latents)
        return denoise(loop, predict, renew(loop, noise, done, again, 1), edits=latents) if again else done

    return probe.trace(pipe, *handlers).run(drive, list(PROMPTS.values())).latents


def test_without_edits_it_is_the_stock_batch_from_one_noise(toy, tmp_path):
    made = latents_of(run_of(tmp_path, toy))
    assert torch.equal(made, stock(toy))
    assert not torch.equal(made[0], made[1])


def test_noise_of_their_own(toy, tmp_path):
    each = latents_of(run_of(tmp_path, toy, sampler={"steps": STEPS, "guidance": 3.0, "noise": "each"}))
    assert torch.equal(each, tiny.latents(load(toy, device="cpu"), list(PROMPTS.values())))


def test_a_transfer_equals_an_independent_patch(toy, edited):
    calls = JointCalls(3, tiny.TEXT + 48)

    def shared(plain, q, k, v, **rest):
        at = calls.next(q)
        if at is not None and at[0] in (1, 2) and at[1] in (0, 2):
            k, v = k[[0, 0, 2, 2]], v[[0, 0, 2, 2]]
        return plain(q, k, v, **rest)

    with patched_attention(shared):
        expected = stock(toy)
    assert torch.equal(latents_of(edited), expected)
    assert torch.equal(latents_of(edited)[0], stock(toy)[0])
    assert not torch.equal(latents_of(edited)[1], stock(toy)[1])


def test_a_guide_equals_the_same_program_by_hand(toy, tmp_path):
    perturb = [{"op": "identity", "form": "whole", "layers": 1}]
    made = run_of(
        tmp_path,
        toy,
        edits=[TAKE],
        guides=[{"weight": 2, "prompts": ["target"], "perturb": perturb}],
        record={"keep_qk": "auto"},
    )
    perturbed = Fork(Identity(), where=probe.Where(layers={1}, branches=Which(role="perturbed")))
    source = lambda branch: probe.Branch(prompt=0, guided=branch.guided)  # noqa: E731
    where = probe.Where(steps=slice(1, 3), layers={0, 2}, branches=Which(prompt=1))
    handlers = [control.Transfer("kv", source, where=where), perturbed]
    expected = by_hand(toy, handlers, guides=(Guide(2.0, prompts=1),))
    assert torch.equal(latents_of(made), expected)
    assert not torch.equal(expected[1], by_hand(toy, handlers[:1])[1])
    assert made.info["layer_passes"] == 3 * 5 * STEPS
    assert {role for _, role in made.segments} == {"plain"}


def test_latents_are_blended_and_renewed(toy, tmp_path):
    blend = {"op": "blend", "source": "source", "masks": [{"box": [0, 0, 4, 2]}], "steps": [1, 3]}
    made = run_of(tmp_path, toy, latents=[blend, {"op": "renew", "time": 0.5, "space": 0.5}])
    blended = Blend(0, 1, probe.region.box(0, 0, 4, 2), slice(1, 3))
    expected = by_hand(toy, latents=[blended], again=LowPass(0.5, 0.5))
    assert torch.equal(latents_of(made), expected)
    assert not torch.equal(expected, by_hand(toy, latents=[blended]))
    assert made.info["layer_passes"] == 3 * 4 * (STEPS + STEPS - 1)
    assert made.steps == tuple(range(STEPS))


def test_every_prompt_has_its_video_and_the_last_one_stands_for_the_run(toy, edited, tmp_path):
    names = {path.name for path in edited.path.iterdir() if path.suffix in (".mp4", ".gif", ".png")}
    assert names == {"video.mp4", "video.gif", "source.mp4", "source.gif", "contact.png"}
    decoded = {name: pixels(toy, latents) for name, latents in zip(PROMPTS, latents_of(edited), strict=True)}
    for file, name in (("video.gif", "target"), ("source.gif", "source")):
        shown = np.asarray(iio.imread(edited.path / file))[:, 4::8, 4::8, :3].astype(int)
        assert np.abs(shown - decoded[name]).mean() < 4, file
    with Image.open(edited.path / "contact.png") as sheet:
        assert sheet.size[1] > 2 * 128
    both = run_of(tmp_path, toy, output={"show": ["source", "target"]})
    assert {path.name for path in both.path.glob("*.gif")} == {"video.gif", "source.gif", "target.gif"}
    with Image.open(both.path / "video.gif") as video:
        assert video.size == (512, 256)


def pixels(model, latents):
    return Loop(load(model, device="cpu"), STEPS, 0).decode(latents[None])[0]


def test_the_record_holds_every_prompt(toy, edited):
    assert edited.segments == ((0, "plain"), (1, "plain"))
    assert (edited.segment_words(0), edited.segment_words(1)) == (("cat",), ("dog",))
    assert edited.segment_attrs(1)["prompt"] == 1
    assert edited.word_map("cat").shape == edited.word_map("dog").shape == (3, 4, 4)
    assert list(edited.tokens(1)["text"][:2]) == ["▁a", "▁blue"]
    maps = probe.WordMaps("dog")
    by_hand(toy, [control.Transfer("kv", 0, 1, where=probe.Where(steps=slice(1, 3), layers={0, 2})), maps])
    expected = maps.word_map("dog", step=2, layer=1, branch=probe.Branch(prompt=1))
    np.testing.assert_allclose(edited.word_map("dog", step=2, layer=1), expected, rtol=0.05)


def test_maps_and_masks_are_those_of_the_prompt_that_has_the_word(edited, capsys):
    main_ok(["maps", str(edited.path), "--word", "dog", "--format", "json"])
    assert "segment 1" in capsys.readouterr().out
    for word in ("cat", "dog"):
        main_ok(
            ["maps", str(edited.path), "--word", word, "--export", "gif", "--out", str(edited.path / f"{word}.gif")]
        )
    a, b = (np.asarray(iio.imread(edited.path / f"{word}.gif")) for word in ("cat", "dog"))
    assert a.shape == b.shape == (9, 256, 256, 3)
    with pytest.raises(AssertionError):
        np.testing.assert_array_equal(a, b)


def test_run_json_says_what_was_run(edited):
    info = edited.info
    assert (info["prompts"], info["names"], info["shown"]) == (list(PROMPTS.values()), ["source", "target"], ["target"])
    assert info["recipe_text"] == edited.recipe == parse.dump(parse.load(str(edited.path / "recipe.yaml")))


def written(folder, model, **more):
    """A recipe in a file."""
    path = folder / "mine.yaml"
    path.write_text(parse.dump(recipe(model, **more)))
    return str(path)


@pytest.mark.parametrize("sampler", ["ddim", "dpm"])
def test_a_stopped_run_goes_on_to_the_same_videos(toy, tmp_path, monkeypatch, capsys, sampler):
    from recipes import run

    more = {"edits": [TAKE], "sampler": {"steps": STEPS, "guidance": 3.0, "scheduler": sampler}}
    whole = run_of(tmp_path / "whole", toy, **more)
    real = run._on_step
    monkeypatch.setattr(run, "_on_step", lambda *given: stopping(real(*given)))
    file, folder = written(tmp_path, toy, **more), tmp_path / "run"
    line = refused(capsys, ["run", file, "--out", str(folder)], 1)
    assert f"2 finished steps stay readable in {folder}. Go on with: mmdit resume {folder}" in line
    monkeypatch.setattr(run, "_on_step", real)
    main_ok(["resume", str(folder)])
    assert torch.equal(latents_of(Run(folder)), latents_of(whole))
    for name in ("video.gif", "source.gif"):
        assert (folder / name).read_bytes() == (whole.path / name).read_bytes()


def stopping(write):
    def on_step(state):
        write(state)
        if state.step == 2:
            raise KeyboardInterrupt

    return on_step


def test_a_run_that_carries_more_than_latents_does_not_go_on(toy, tmp_path, monkeypatch, capsys):
    from recipes import run

    real = run._on_step
    monkeypatch.setattr(run, "_on_step", lambda *given: stopping(real(*given)))
    mask = {"masks": {"obj": {"word": "cat"}}, "edits": [{**TAKE, "rows": "obj"}]}
    file, folder = written(tmp_path, toy, **mask), tmp_path / "run"
    line = refused(capsys, ["run", file, "--out", str(folder)], 1)
    assert "Start the recipe again: a run with masks of its own attention cannot go on." in line
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    line = refused(capsys, ["resume", str(folder)], 1)
    assert "must carry nothing but its latents from step to step. Got masks of its own attention" in line
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_clash_is_refused_before_a_folder_is_made(toy, tmp_path, capsys):
    file = written(tmp_path, toy, edits=[TAKE, {**TAKE, "tensors": "v"}])
    for more in (["--dry-run"], ["--out", str(tmp_path / "run")]):
        assert "edits.1 transfer: Two edits must not change" in refused(capsys, ["run", file, *more], 2)
    assert not (tmp_path / "run").exists()


def test_a_dry_run_runs_nothing(toy, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("recipes.run.load", lambda *a, **k: 1 / 0)
    main_ok(["run", written(tmp_path, toy, edits=[TAKE]), "--dry-run", "--format", "json"])
    told = json.loads(capsys.readouterr().out)
    assert told["prompts"] == [f"{name}: {text}" for name, text in PROMPTS.items()]
    assert told["layer passes of each step"] == "12 in 0 to 3"
    assert "steps 1 to 2, layers 0, 2, all heads, prompts target" in told["edits.0 transfer"]
