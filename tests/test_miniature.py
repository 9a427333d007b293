"""The shipped miniature: what it is made of, that stock diffusers loads it, and that it still draws what it is asked
for.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import CogVideoXPipeline

import probe
from recipes import scene

FOLDER = Path(__file__).parents[1] / "data" / "miniature"


def test_its_files():
    weights = {file.relative_to(FOLDER) for file in FOLDER.rglob("*") if file.stat().st_size > 500_000}
    assert {file.suffix for file in weights} == {".safetensors"}
    assert sum(file.stat().st_size for file in FOLDER.rglob("*")) < 25e6
    config = json.loads((FOLDER / "transformer" / "config.json").read_text())
    assert config["num_layers"] >= 6
    assert config["num_attention_heads"] >= 4
    assert config["sample_frames"] == 17


def test_stock_diffusers_loads_it_and_probe_load_is_the_same():
    def frames(pipe, **call):
        generator = torch.Generator().manual_seed(3)
        call |= {"num_inference_steps": 25, "guidance_scale": 2.0, "generator": generator, "output_type": "np"}
        return pipe("a green square moving down", **call).frames[0]

    stock = CogVideoXPipeline.from_pretrained(FOLDER)
    stock.set_progress_bar_config(disable=True)
    expected = frames(stock, max_sequence_length=20)
    assert np.array_equal(frames(probe.load("miniature")), expected)
    seen = scene.classify((expected * 255).round().astype(np.uint8))
    assert seen is not None
    assert (seen.color, seen.shape, seen.direction, seen.background) == ("green", "square", "down", "black")


@pytest.fixture(scope="module")
def figures():
    """What the evaluation script prints, on a fifth of the prompts."""
    command = [sys.executable, str(FOLDER / "evaluate.py"), "--quick", "--format", "json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=FOLDER.parents[1])
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_the_rules_prove_themselves(figures):
    assert figures["rules"]["drawn"]["all"] >= 0.99
    assert figures["rules"]["through the autoencoder"]["all"] >= 0.95


def test_it_draws_what_it_is_asked_for(figures):
    drawn = figures["drawn as asked"]
    assert drawn["color"] >= 0.95
    assert drawn["shape"] >= 0.80
    assert drawn["direction"] >= 0.90


def test_its_word_maps_lie_on_the_object(figures):
    maps = figures["word maps"][figures["reading"]]
    assert maps["color and noun"] >= 0.6
    assert maps["noun"] >= 0.5
    assert figures["two objects"]["control: the other object"] <= 0.3
