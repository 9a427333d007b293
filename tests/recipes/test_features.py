"""The small CLIP that is shipped, and how any CLIP is fed."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPModel

from ditctrl import metric
from probe.errors import ModelError
from recipes import features, scene

RNG = np.random.default_rng(5)


@pytest.fixture(scope="module")
def small():
    return features.load("miniature", device="cpu")


@pytest.fixture(scope="module")
def fresh():
    """Clips it has not seen, and what they show."""
    scenes = [scene.sample(RNG, pair=0.0) for _ in range(40)]
    return [scene.render(one)[8] for one in scenes], [one.things[0] for one in scenes], [s.background for s in scenes]


def test_it_is_small():
    files = list(features.SMALL.iterdir())
    assert sum(file.stat().st_size for file in files if file.suffix == ".safetensors") < 1.5e6
    assert {file.suffix for file in files} <= {".safetensors", ".json", ".md"}


def test_images_are_those_of_the_vision_model_on_the_pictures_it_was_trained_on(small):
    """Frames enlarged four times come back to themselves by halving; only grey levels -1 to 1 remain to be made."""
    frames = np.stack([scene.render(scene.sample(RNG))[0] for _ in range(3)])
    pooled, embedded = small.images(frames.repeat(4, 1).repeat(4, 2))
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 127.5 - 1
    model = CLIPModel.from_pretrained(features.SMALL, dtype=torch.float32).eval()
    with torch.no_grad():
        own = model.vision_model(pixel_values=pixels).pooler_output
        projected = model.get_image_features(pixel_values=pixels).pooler_output
    assert np.allclose(pooled, own.numpy(), atol=1e-4)
    assert np.allclose(embedded, projected.numpy(), atol=1e-4)
    assert pooled.shape[1] != embedded.shape[1]


def test_a_large_frame_is_halved_by_a_box_before_it_is_brought_to_size(small):
    wide = RNG.integers(0, 255, (1, 200, 300, 3), np.uint8)
    asked = []
    spied = features.Features(
        "spied", small.model, lambda images, **given: asked.append(images) or small.processor(images, **given), None
    )
    spied.images(wide)
    (picture,) = asked[0]
    assert picture.size == (150, 100)
    box = wide[0].reshape(100, 2, 150, 2, 3).mean((1, 3))
    assert np.abs(np.asarray(picture) - box).max() <= 1  # rounded along rows and along columns
    assert isinstance(picture, Image.Image)


def test_more_frames_than_a_batch_come_out_in_order(small, monkeypatch):
    frames = np.stack([scene.render(scene.sample(RNG))[0] for _ in range(5)])
    whole = small.images(frames)[0]
    monkeypatch.setattr(features, "BATCH", 2)
    assert np.allclose(small.images(frames)[0], whole, atol=1e-5)


@pytest.mark.parametrize("what", ["color", "shape", "background"])
def test_it_tells_right_captions_from_wrong_ones(small, fresh, what):
    frames, things, backgrounds = fresh
    embedded = small.images(np.stack(frames))[1]
    right = 0
    for image, thing, background in zip(embedded, things, backgrounds, strict=True):
        said = {"color": thing.color, "shape": thing.shape, "background": background}
        choices = {"color": scene.COLORS, "shape": scene.SHAPES, "background": scene.BACKGROUNDS}[what]
        captions = [_caption({**said, what: choice}, thing.direction) for choice in choices]
        cosines = metric.text_similarity(image[None], small.texts(captions), np.eye(len(captions)))
        right += list(choices)[int(cosines.argmax())] == said[what]
    assert right / len(frames) > 0.9


def test_a_direction_hardly_matters(small, fresh):
    frames, things, backgrounds = fresh
    said = {"color": things[0].color, "shape": things[0].shape, "background": backgrounds[0]}
    texts = small.texts([_caption(said, direction) for direction in scene.DIRECTIONS])
    cosines = metric.text_similarity(np.tile(small.images(np.stack(frames[:1]))[1], (4, 1)), texts, np.eye(4))
    assert np.ptp(cosines) < 0.1


def test_cscv_of_a_smooth_clip_is_high_and_a_cut_is_not(small):
    one, other = (
        scene.Thing(c, s, "right", 12.0, (16, 32), (48, 32)) for c, s in (("red", "circle"), ("blue", "square"))
    )
    smooth = scene.render(scene.Scene((one,), "white"))
    cut = np.concatenate([smooth[:9], scene.render(scene.Scene((other,), "green"))[9:]])
    assert metric.cscv(small.images(smooth)[0]) > 0.85
    assert metric.cscv(small.images(cut)[0]) < metric.cscv(small.images(smooth)[0]) - 0.3


def test_a_long_text_is_cut_to_what_the_model_reads(small):
    assert small.texts(["a red circle " * 40]).shape == small.texts(["a red circle"]).shape


@pytest.mark.parametrize("name", ["nowhere/at/all", "./nowhere", "word", ""])
def test_a_name_that_is_nothing_is_refused(name):
    with pytest.raises(ModelError, match="which is none of these"):
        features.load(name)


def test_an_install_without_the_small_model_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(features, "SMALL", tmp_path / "none")
    with pytest.raises(ModelError, match="Work in a clone"):
        features.load("miniature")


def _without_weights(folder):
    (folder / "model.safetensors").unlink()


def _cut_weights(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def _another_model(folder):
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "t5"}))


def _lacking(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("spoil", [_without_weights, _cut_weights, _another_model, _lacking])
def test_a_folder_that_is_no_whole_clip_is_refused(tmp_path, spoil):
    folder = tmp_path / "clip"
    shutil.copytree(features.SMALL, folder)
    spoil(folder)
    with pytest.raises(ModelError, match=r"Features must be a CLIP of transformers\. Got .*\. Take miniature"):
        features.load(str(folder))


def _caption(said, direction):
    return f"a {said['color']} {said['shape']} moving {direction} on a {said['background']} background"
