"""DiTCtrl's modes as recipes: the handlers they become equal the authors' classes written out, and what they leave."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import probe
from control.adapter import Loop
from control.denoise import Lockstep
from probe.store import Run
from recipes.catalogue import interventions
from recipes.cli import main
from recipes.job import prepare
from recipes.language import parse
from tests import tiny
from tests.ditctrl.edit_loop import EditLoop
from tests.recipes.line import FAST, TWO, main_ok, refused

STEPS = 25
SHARED = range(1, 12)


@pytest.fixture(scope="module", params=[False, True], ids=["sincos", "rotary"])
def double(request):
    return tiny.pipeline(rotary=request.param, dtype=torch.float64)


def predictions(pipe, toy, name, *sets, target=tiny.OTHER, steps=(0, 1, 5, 20)):
    """What a recipe predicts for its two prompts from random latents, and those latents."""
    torch.manual_seed(0)
    prompts = {"source": tiny.PROMPT, "target": target}
    recipe = parse.load(name, [f"sampler.steps={STEPS}", *sets], {"model": toy, "prompts": prompts})
    job = prepare(recipe)
    made = interventions(job)
    loop = Loop(pipe, STEPS, seed=0, sampler="dpm")
    text, x = loop.encode(recipe.texts), torch.randn(1, 3, 4, 8, 8, dtype=torch.float64)
    method = Lockstep(loop, text, torch.zeros_like(text), job.scale, None)
    traced = probe.trace(pipe, *made.handlers)

    def drive(clock):
        return {step: replace(method, clock=clock)(torch.cat([x, x]), step) for step in range(max(steps) + 1)}

    with torch.no_grad():
        found = traced.run(drive, recipe.texts)
    return job, loop, text, x, {step: found[step] for step in steps}


def guided(outputs, scale):
    u_s, u_t, c_s, c_t = outputs
    return torch.stack([u_s + scale * (c_s - u_s), u_t + scale * (c_t - u_t)])


def test_word_swap_equals_the_literal_batch_of_four(double, toy):
    job, loop, text, x, found = predictions(double, toy, "ditctrl-word-swap")
    shared = lambda step, layer: step in SHARED and layer == 2  # noqa: E731
    oracle = EditLoop(double.transformer, shared, rotary=loop._rotary(3))
    for step, output in found.items():
        t = loop.timesteps[step]
        expected = guided(oracle.forward(x, text[:1], text[1:], t, step), job.scale(t))
        assert (output - expected).abs().max() < 1e-11 * expected.abs().max()
    without = EditLoop(double.transformer, lambda *_: False, rotary=loop._rotary(3))
    t = loop.timesteps[5]
    assert (guided(without.forward(x, text[:1], text[1:], t, 5), job.scale(t)) - found[5]).abs().max() > 1e-5


@pytest.mark.parametrize("factor", [0.0, 0.5, -5.0])
def test_reweight_equals_the_literal_batch_of_four(double, toy, factor):
    sets = ("word=cat", f"factor={factor}")
    job, loop, text, x, found = predictions(double, toy, "ditctrl-reweight", *sets, target=tiny.PROMPT)
    oracle = EditLoop(double.transformer, lambda step, _: step < 1, (2,), factor, loop._rotary(3))
    for step, output in found.items():
        t = loop.timesteps[step]
        expected = guided(oracle.forward(x, text[:1], text[1:], t, step), job.scale(t))
        assert (output - expected).abs().max() < 1e-10 * expected.abs().max()
    assert (found[5][0] - found[5][1]).abs().max() > 1e-6


def test_objects_of_a_word_swap_look_at_objects(double, toy):
    plain = predictions(double, toy, "ditctrl-word-swap")[-1]
    made = predictions(double, toy, "ditctrl-word-swap", "edits.0.objects=[cat, dog]")[-1]
    assert torch.equal(made[5][0], plain[5][0])  # the source keeps its bits
    assert (made[5][1] - plain[5][1]).abs().max() > 1e-6
    assert torch.equal(made[20], plain[20])  # outside of the window nothing differs


def test_isolated_clips_start_from_the_noise_of_their_first_segments(toy, tmp_path):
    for name in ("ditctrl-isolated", "ditctrl-no-sharing"):
        main_ok(["run", name, "-m", toy, *TWO, *FAST, "--out", str(tmp_path / name)])
    apart, joined = (Run(tmp_path / name) for name in ("ditctrl-isolated", "ditctrl-no-sharing"))
    assert apart.segments == ((0, "plain"), (1, "plain"))
    assert joined.segments == tuple((segment, "plain") for segment in range(4))
    loaded = parse.load("ditctrl-isolated", ["sampler.steps=5"], {"model": toy, "prompts": [tiny.PROMPT, tiny.OTHER]})
    from recipes.loaded import opened

    job = prepare(loaded)
    start = opened(job, interventions(job), lambda: probe.load(toy)).start().latents
    long = Loop(probe.load(toy), 5, 3, "dpm").noise(1, 6, torch.float32)
    assert torch.equal(start, torch.cat([long[:, 0:3], long[:, 3:6]], 1))
    assert apart.resume()[1]["latents"].shape == (1, 6, 4, 8, 8)
    assert (job.pixel_frames, job.frames) == (18, 6)  # two clips of nine frames


def test_a_longer_single_prompt(toy, tmp_path):
    main_ok(["run", "ditctrl-longer", "-m", toy, "-p", tiny.PROMPT, *FAST, "--out", str(tmp_path / "run")])
    run = Run(tmp_path / "run")
    assert {segment for segment, _ in run.segments} == {0, 1, 2, 3}
    job = prepare(parse.load("ditctrl-longer", ["segments.times=5"], {"model": toy, "prompts": [tiny.PROMPT]}))
    assert job.segments.count == 13
    told = ["segments.times=null", "segments.durations=[4]"]
    lasting = prepare(parse.load("ditctrl-longer", told, {"model": toy, "prompts": [tiny.PROMPT]}))
    assert abs(lasting.pixel_frames / 8 - 4) < 0.5


def test_the_papers_variant_resolves_every_auto(toy):
    job = prepare(parse.load("ditctrl-paper", ["edits.0.objects=red"], {"model": toy, "prompts": ["a red cat"] * 2}))
    assert (job.segments.transitions, job.segments.overlap, job.segments.variant) == (1, 1, "paper")
    assert job.window.steps == range(2, 26)
    (masks,) = interventions(job).shared
    assert masks.region == "mean"


@pytest.mark.parametrize("neighbours", ["keep", "offload", "recompute"])
def test_segments_in_batches_make_the_same_video(toy, recorded, tmp_path, neighbours, capsys):
    out = tmp_path / neighbours
    chunked = ["--segments-per-batch", "1", "--neighbours", neighbours]
    main_ok(["run", "ditctrl", "-m", toy, *TWO, *FAST, *chunked, "--out", str(out)])
    made, whole = Run(out), Run(recorded)
    assert np.abs(made.resume()[1]["latents"] - whole.resume()[1]["latents"]).max() < 1e-4
    assert made.segments == whole.segments
    once = made.info["layer_passes"] == whole.info["layer_passes"]
    assert once == (neighbours != "recompute")
    capsys.readouterr()
    main_ok(["run", "ditctrl", "-m", toy, *TWO, *FAST, *chunked, "--dry-run", "--format", "json"])
    assert json.loads(capsys.readouterr().out)["layer passes"] == made.info["layer_passes"]


def test_a_masked_story_goes_on_after_it_stopped(toy, tmp_path, monkeypatch):
    from recipes import run as running

    line = ["run", "ditctrl-masked", "-m", toy, "-p", tiny.PROMPT, "-p", tiny.PROMPT, *FAST, "--set"]
    line += ["edits.0.objects=red cat", "--segments-per-batch", "1"]
    main_ok([*line, "--out", str(tmp_path / "whole")])
    write = running.Recorder.write

    def stops(self, step, *rest):
        if step == 1:
            raise KeyboardInterrupt
        write(self, step, *rest)

    monkeypatch.setattr(running.Recorder, "write", stops)
    with pytest.raises(SystemExit):
        main([*line, "--out", str(tmp_path / "part")])
    monkeypatch.setattr(running.Recorder, "write", write)
    main_ok(["resume", str(tmp_path / "part")])
    one, other = (Run(tmp_path / name).resume()[1]["latents"] for name in ("whole", "part"))
    assert np.array_equal(one, other)  # in batches as it began, though resume was not told
    whole, part = (Run(tmp_path / name).info["layer_passes"] for name in ("whole", "part"))
    assert whole == part


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (["run", "ditctrl", "-p", "a red circle"], "at least two prompts"),
        (["run", "ditctrl-longer", "-p", "a red circle", "-p", "a circle"], "times must be of a single prompt"),
        (["run", "ditctrl-masked", "--set", "edits.0.objects=square"], "must have words of prompt 0"),
        (["run", "ditctrl", "--set", "segments.isolated=true"], "must not take from the previous segment"),
        (["run", "ditctrl", "--segments-per-batch", "0"], "greater than or equal to 1"),
        (["run", "ditctrl", "--neighbours", "offload"], "must come with --segments-per-batch"),
        (["run", "ditctrl-word-swap", "--segments-per-batch", "1"], "must be those of a story"),
        (["run", "ditctrl", "--set", "segments.middle=1"], "must be of prompts between the first and the last"),
        (["run", "ditctrl", "--set", "segments.durations=[1e12, 1]"], "must have at most 10000 segments"),
        (["run", "ditctrl", "--set", "segments.transitions=100000000"], "must have at most 10000 segments"),
        (["run", "ditctrl", "--neighbours", "lose"], "must be keep, offload or recompute"),
        (["run", "ditctrl-longer", "--set", "segments.durations=[4]"], "one of middle, times, durations and isolated"),
    ],
)
def test_what_cannot_be_is_one_sentence(toy, capsys, line, sentence):
    assert sentence in refused(capsys, [*line, "-m", toy, "--dry-run"], 2)


def test_a_clip_that_is_isolated_needs_no_neighbour(toy):
    job = prepare(parse.load("ditctrl-isolated", [], {"model": toy, "prompts": [tiny.PROMPT, tiny.OTHER]}))
    assert job.window is None
    assert job.connected.count == 4


def test_masks_of_words_and_settling_see_steps_that_share(toy, tmp_path):
    """What each sees of a segment goes on from step to step, whatever the roles of its branches."""
    inside = {"op": "scale", "tensor": "o", "factor": 0, "rows": "m", "layers": [0, 2], "steps": [1, 3]}
    share = {"op": "transfer", "source": "previous_segment", "steps": [0, 3], "layers": "auto"}
    line = ["run", "ditctrl", "-m", toy, "-p", tiny.PROMPT, "-p", tiny.PROMPT, *FAST, "--set", "record=null"]
    both = [f"edits={json.dumps([share, inside])}", f"edits={json.dumps([share])}"]
    for name, edits in zip("ab", both, strict=True):
        main_ok([*line, "--set", 'masks={"m": {"word": "cat"}}', "--set", edits, "--out", str(tmp_path / name)])
    one, other = (Run(tmp_path / name).resume()[1]["latents"] for name in "ab")
    assert not np.array_equal(one, other)


def test_settling_compares_neighbouring_steps_alone(double):
    settling = probe.Settling()
    x = torch.randn(3, 3, 4, 8, 8, dtype=torch.float64)
    text = torch.randn(3, tiny.TEXT, 16, dtype=torch.float64)
    rotary = Loop(double, STEPS, 0)._rotary(3)

    def drive(clock):
        for step, role in enumerate(("plain", "source", "plain", "plain")):
            clock.tell(step, 4, [probe.Branch(segment=k, role=role) for k in range(3)])
            double.transformer(x, text, torch.full((3,), 500), image_rotary_emb=rotary, return_dict=False)

    with torch.no_grad():
        probe.trace(double, settling).run(drive, [tiny.PROMPT])
    assert {at.step for at in settling.values} == {3}
