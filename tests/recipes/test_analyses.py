"""Recipes that only look, and what they keep: similarity of prompts, settling, concept masks, rotary positions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import softmax

from control.extract import ExtractMask
from control.rotate import Rotate
from probe import region, trace
from probe.errors import RecipeError, UsageError
from probe.site import Where, Which
from recipes.catalogue import interventions
from recipes.job import prepare
from recipes.language import parse
from recipes.run import execute
from tests import tiny
from tests.recipes.line import main_ok

STEPS = 4
PROMPTS = {"first": tiny.PROMPT, "second": tiny.OTHER}
VIDEO = slice(tiny.TEXT, None)


def recipe(model, **more):
    data = {"schema_version": 1, "name": "look", "model": model, "prompts": PROMPTS}
    return parse.validate({**data, "sampler": {"steps": STEPS, "guidance": 3.0}, **more}, "look")


@pytest.fixture(autouse=True)
def without_mp4(monkeypatch):
    monkeypatch.setattr("probe.film.has_ffmpeg", lambda: False)


def bhattacharyya(one, other, place=slice(None)):
    """Mean over the video rows of sum_j sqrt(p_ij p'_ij), [H], from kept (q, k)."""
    maps = []
    for q, k in (one, other):
        q, k = q.astype(float)[:, VIDEO], k.astype(float)[:, place]
        maps.append(softmax(q @ k.swapaxes(-1, -2) / q.shape[-1] ** 0.5, -1))
    return np.sqrt(maps[0] * maps[1]).sum(-1).mean(-1)


def test_similarity_and_settling_are_those_of_the_kept_queries_and_keys(toy, tmp_path):
    """Of the distance 1 - B: the maps of a toy are nearly even, and queries and keys are kept in half precision."""
    record = {"words": ["cat", "dog"], "readouts": ["similarity", "settling"], "keep_qk": [[1, 1], [2, 1]]}
    run = execute(recipe(toy, edits=[{"op": "temper", "factor": 400}], record=record), tmp_path / "run", quiet=True)
    first, second, before = (run.qk(1, step, prompt) for step, prompt in ((2, 0), (2, 1), (1, 1)))
    alike = run.metric_grid("similarity_bhattacharyya_within_video", 2, segment=1)[1].astype(float)
    settled = run.metric_grid("settling_bhattacharyya_video", 2, segment=1)[1].astype(float)
    np.testing.assert_allclose(1 - alike, 1 - bhattacharyya(first, second, VIDEO), rtol=0.1)
    np.testing.assert_allclose(1 - settled, 1 - bhattacharyya(before, second), rtol=0.1)


def test_a_mask_of_the_record_is_kept_beside_the_run(toy, tmp_path):
    masks = {"cat": {"word": "cat"}, "unused": {"word": "red"}}
    given = recipe(toy, masks=masks, record={"words": ["cat"], "masks": ["cat"]})
    made = interventions(prepare(given))
    assert [str(one) for one in made.shared] == ["ExtractMask(cat)"]
    assert isinstance(made.shared[0], ExtractMask)
    run = execute(given, tmp_path / "run", quiet=True)
    mask = np.load(run.path / "mask_cat.npz")["mask"]
    assert mask.shape == (3, 4, 4)
    assert 0 < mask.sum() < mask.size
    assert not (run.path / "mask_unused.npz").exists()
    main_ok(["mask", str(run.path), "--word", "cat", "--against", str(run.path / "mask_cat.npz")])


def test_position_dependence_rotates_the_keys_of_one_layer(tmp_path):
    pipe = tiny.pipeline(rotary=True)
    pipe.save_pretrained(tmp_path / "rotary")
    sets = [f"model={tmp_path / 'rotary'}", "sampler.steps=4", "sampler.guidance=3", "layer=1", "shift=[1, 0, 2]"]
    sets += [f"prompts.{name}={tiny.PROMPT}" for name in ("plain", "moved")]
    run = execute(parse.load("position-dependence", sets), tmp_path / "run", quiet=True)
    plain, moved = torch.from_numpy(run.resume()[1]["latents"])
    where = Where(layers=(1,), branches=Which(prompt=1))
    shifted = Rotate("k", (1, 0, 2), rows=region.video(), where=where)
    same = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "latent"}
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    expected = trace(pipe, shifted)(prompt=[tiny.PROMPT] * 2, generator=generators, **same).frames
    assert torch.equal(plain, expected[0])
    assert torch.equal(moved, expected[1])
    assert not torch.equal(plain, moved)


def test_what_an_analysis_lacks_is_said(toy):
    with pytest.raises(RecipeError, match=r"record.masks.0 must name a mask of words. Got 'car'. Did you mean cat\?"):
        recipe(toy, masks={"cat": {"word": "cat"}}, record={"masks": ["car"]})
    with pytest.raises(RecipeError, match=r"record.readouts must have several prompts side by side"):
        recipe(toy, prompts=[tiny.PROMPT], record={"readouts": ["similarity"]})
    with pytest.raises(RecipeError, match="must have rivals, and neither direction nor propagate, with outputs_of"):
        recipe(toy, masks={"dog": {"word": "dog", "prompt": "second", "outputs_of": "first"}})
    with pytest.raises(UsageError, match="must have a model that rotates queries and keys"):
        interventions(prepare(parse.load("position-dependence")))
