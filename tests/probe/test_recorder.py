"""What a record keeps of a run: each step once, each kind of attention under its name, and nothing by half."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler

import probe
from probe import store_index
from probe.errors import UsageError
from probe.plan import Stage
from probe.readout.base import Readout
from probe.recorder import Recorder, generate, record
from probe.site import Branch, Where, Which
from tests import tiny
from tests.probe import samples
from tests.toys import sd3, wan

SMALL: dict[str, Any] = {"height": 32, "width": 32, "num_frames": 5}


def recorded(
    pipe: Any, folder: Any, *readouts: Readout, prompt: str = tiny.PROMPT, steps: int = 2, **call: Any
) -> probe.Run:
    return generate(pipe, prompt, readouts, folder, call={"num_inference_steps": steps, "guidance_scale": 3.0, **call})


def traced(pipe: Any, *readouts: Readout, steps: int = 2, **call: Any) -> tuple[Readout, ...]:
    """The same run without a record: what the readouts saw."""
    call = {"num_inference_steps": steps, "guidance_scale": 3.0, "output_type": "latent", **call}
    probe.trace(pipe, *readouts)(prompt=tiny.PROMPT, generator=torch.Generator().manual_seed(0), **call)
    return readouts


def at(readout: Readout, **asked: Any) -> Any:
    """The one value, of the first evaluation, that a readout has there."""
    return readout.values[readout.at(**asked)[0]]


def matrix_row(query, key, head, token):
    """One row of softmax(Q K^T / sqrt(D)) in float64."""
    query, key = (np.asarray(array[head], np.float64) for array in (query, key))
    logits = key @ query[token] / query.shape[-1] ** 0.5
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def test_a_second_order_sampler_writes_each_denoising_step_once(tmp_path):
    pipe = sd3.pipeline()
    pipe.scheduler = FlowMatchHeunDiscreteScheduler()
    maps = probe.WordMaps("cat")
    run = recorded(pipe, tmp_path / "run", maps, steps=3)
    timesteps = [float(one) for one in pipe.scheduler.timesteps]
    assert len(timesteps) == 5
    assert run.steps == (0, 1, 2)
    assert [run.step_attrs(step)["timestep"] for step in run.steps] == timesteps[::2]
    assert not maps.values
    (seen,) = traced(pipe, probe.WordMaps("cat"), steps=3)
    for step in run.steps:
        expected = at(seen, step=step, layer=1)["vt"][0, 0]
        np.testing.assert_allclose(run.word_map("cat", step=step, layer=1), expected, rtol=0.05)
    assert run.resume()[0] == 2


def test_two_kinds_of_attention_are_told_apart(tmp_path):
    pipe, own = wan.pipeline(), probe.Entropy
    looks = (probe.WordMaps("cat", directions=("vt",)), probe.FrameMass(), own(), probe.KeepQK([(1, 1)]))
    run = recorded(pipe, tmp_path / "run", *looks, **SMALL)
    assert set(run.layer_kinds.values()) == {"cross"}
    frames, entropy, kept = traced(pipe, probe.FrameMass(), own(), probe.KeepQK([(1, 1)], np.float32), **SMALL)
    np.testing.assert_allclose(run.frames(step=1, layer=1, head=0), at(frames, step=1, layer=1)[0], rtol=1e-6)
    for name, kind in (("entropy_video", "cross"), ("entropy_video_self", "self")):
        expected = at(entropy, step=1, layer=1, kind=kind)["entropy"][0, 2, 0]
        assert run.metric(name, step=1, layer=1, head=0) == pytest.approx(expected, rel=1e-6)
    for kind in ("self", "cross"):
        tensors = at(kept, step=1, layer=1, kind=kind)
        video, text = run.attention_row(1, 1, 1, token=(1, 0, 1), kind=kind)
        expected = matrix_row(tensors["q"], tensors["k"], 1, video[0].size + 1)
        np.testing.assert_allclose(text if kind == "cross" else video.ravel(), expected, rtol=2e-2)
        assert (text.size, video.any()) == ((0, True) if kind == "self" else (expected.size, False))
    others = run.index.head(1).segments[0, "plain"].other_kinds
    assert others["frames"] == others["metrics/entropy_video_self"] == "self"
    assert not {"maps/vt", "metrics/entropy_video"} & set(others)


def test_kept_query_and_key_alone_know_their_kind(tmp_path):
    where = Where(kinds={"cross"})
    run = recorded(wan.pipeline(), tmp_path / "run", probe.KeepQK([(0, 1)], where=where), **SMALL)
    video, text = run.attention_row(1, 0, token=(0, 0, 0))
    assert text.sum(dtype=float) == pytest.approx(1, abs=1e-5)
    assert not video.any()


def test_a_layer_without_the_second_attention_has_no_number_of_it(tmp_path):
    looks = (probe.WordMaps("cat"), probe.Entropy())
    run = recorded(sd3.pipeline(sd3.DUAL), tmp_path / "run", *looks)
    assert set(run.layer_kinds.values()) == {"joint"}
    own = run.metric_grid("entropy_video_self", 0)
    assert np.isnan(own).all(1).tolist() == [False, False, True]
    assert np.isfinite(run.metric_grid("entropy_video", 0)).all()
    assert (own[:2] <= np.log(sd3.PATCHES) + 1e-4).all()


def test_a_table_is_of_the_attention_its_layer_is_named_after(tmp_path):
    run = recorded(wan.pipeline(), tmp_path / "run", probe.ColumnMass(), **SMALL)
    assert set(run.layer_kinds.values()) == {"cross"}
    (columns,) = traced(wan.pipeline(), probe.ColumnMass(), **SMALL)
    expected = at(columns, step=0, layer=1, kind="cross")["mass"][0, 0]
    np.testing.assert_allclose(run.columns(step=0, layer=1, head=0), expected, rtol=1e-6)


def test_one_kind_can_be_chosen(tmp_path):
    looks = (probe.WordMaps("cat", directions=("vt",)), probe.Entropy(where=Where(kinds={"self"})))
    run = recorded(wan.pipeline(), tmp_path / "run", *looks, **SMALL)
    (entropy,) = traced(wan.pipeline(), probe.Entropy(), **SMALL)
    expected = at(entropy, step=0, layer=0, kind="self")["entropy"][1, 2, 0]
    assert run.metric("entropy_video", step=0, layer=0, head=1) == pytest.approx(expected, rel=1e-6)
    assert run.index.head(0).segments[0, "plain"].other_kinds["metrics/entropy_video"] == "self"


@pytest.mark.parametrize(
    ("readouts", "said"),
    [
        ([probe.FrameMass(where=Where(heads=1))], "A recorded readout must keep all heads"),
        ([probe.FrameMass(), probe.FrameMass()], "A record must have one readout for its frames."),
        ([probe.RegionMass(), probe.RegionMass(stage=Stage.BEFORE)], "A record must have one readout for its mass."),
        ([probe.WordMaps("cat"), probe.WordMaps("red")], "A record must have one readout for its maps."),
        ([probe.Entropy(), probe.Entropy(stage=Stage.BEFORE)], "A metric must have one meaning in a record."),
        (
            [probe.Entropy(where=Where(kinds={"self"})), probe.Entropy(where=Where(kinds={"cross"}))],
            "A metric must have one meaning in a record. Got effective_keys_text from",
        ),
        ([probe.FrameMass(where=Where(branches=Which()))], "Readouts of one record must see one half of guidance."),
        (
            [probe.RegionMass(), probe.FrameMass(where=Where(branches=Which(guided=False)))],
            "Readouts of one record must see one half of guidance.",
        ),
    ],
)
def test_readouts_that_cannot_share_a_record_are_refused(readouts, said):
    with pytest.raises(UsageError) as caught:
        Recorder(None, (), readouts)  # type: ignore[arg-type]
    assert str(caught.value).startswith(said)


def test_readouts_that_measure_the_same_may_share_a_name():
    Recorder(None, (), [probe.FrameMass(), probe.ColumnMass(), probe.Locality()])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("prompt", "call", "got"),
    [
        (tiny.PROMPT, {"num_images_per_prompt": 2}, "Got num_images_per_prompt=2."),
        ([tiny.PROMPT, tiny.OTHER], {}, f"Got {[tiny.PROMPT, tiny.OTHER]}."),
    ],
)
def test_several_videos_are_refused_before_a_folder_is_made(tmp_path, prompt, call, got):
    with pytest.raises(UsageError, match="record.. must make one video or picture of one prompt") as caught:
        record(sd3.pipeline(), prompt, out=tmp_path / "run", num_inference_steps=2, **call)
    assert got in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_two_branches_of_one_place_are_refused_in_one_sentence():
    frames = probe.FrameMass()
    for copy in range(2):
        frames.values[probe.At(0, Branch(copy=copy), 0)] = np.zeros((2, 3, 4), np.float32)
    with pytest.raises(UsageError, match="A record must see one branch of a segment and role. Got conditional prompt"):
        Recorder(None, (), [frames]).write(0, {})  # type: ignore[arg-type]


def test_the_unconditional_half_shows_no_prompt(tmp_path):
    where = Where(branches=Which(guided=False))
    run = recorded(tiny.pipeline(), tmp_path / "run", probe.FrameMass(where=where))
    assert run.segment_attrs()["guided"] is False
    assert {name: array.size for name, array in run.tokens().items()} == dict.fromkeys(run.tokens(), 0)
    assert run.frames().sum(-1) == pytest.approx(1, abs=1e-5)
    assert recorded(tiny.pipeline(), tmp_path / "other", probe.FrameMass()).tokens()["text"].size == tiny.TEXT


def test_an_empty_prompt_has_no_tokens(tmp_path):
    run = recorded(tiny.pipeline(), tmp_path / "run", probe.FrameMass(), prompt="")
    assert run.steps == (0, 1)
    assert run.tokens()["text"].size == 0


@pytest.mark.parametrize("direction", ["vt", "vt_text", "tv", "mean"])
def test_every_direction_of_a_word_map_is_recorded(tmp_path, direction):
    pipe = tiny.pipeline()
    run = recorded(pipe, tmp_path / "run", probe.WordMaps("cat", directions=(direction,)))
    (maps,) = traced(pipe, probe.WordMaps("cat", directions=(direction,)))
    expected = at(maps, step=1, layer=2)[direction][0, 0]
    np.testing.assert_allclose(run.word_map("cat", step=1, layer=2, direction=direction), expected, rtol=0.05)


def test_a_known_step_is_found_without_looking_through_the_folder(tmp_path, monkeypatch):
    run = samples.write_run(tmp_path / "run", 3)
    run.index.heads()
    looked = []
    listed = store_index.step_files
    monkeypatch.setattr(store_index, "step_files", lambda folder: looked.append(folder) or listed(folder))
    run.index.heads()
    assert len(looked) == 1
