"""Measure the miniature: the rules themselves, what it draws, and whether its word maps lie on the object.

    python data/miniature/evaluate.py                 # all 60 prompts, two seeds: the model card's figures
    python data/miniature/evaluate.py --quick         # 12 prompts, one seed
    python data/miniature/evaluate.py --format json

Object masks come from the generated frames, by color; a token belongs to the object if more than half of its
pixels do. A word map is the mean over the middle layers and the middle 60 % of the steps, cut by Otsu's method.
Which direction to read (``vt``: video rows, text columns; ``tv``: text rows, video columns) is chosen on other
prompts, those of ``CHOOSING``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from model import FOLDER, load_vae, to_clips, to_pixels
from numpy.typing import NDArray
from skimage.filters import threshold_otsu

import probe
from recipes import scene

LAYERS, STEPS = (1, 2, 3, 4), (0.2, 0.8)
BATCH = 10
CHOOSING = [
    f"a {color} {shape} moving {direction} on a {background} background"
    for color, shape, direction, background in (
        ("red", "circle", "right", "white"),
        ("green", "square", "left", "blue"),
        ("blue", "triangle", "up", "gray"),
        ("yellow", "circle", "down", "green"),
        ("purple", "square", "right", "white"),
        ("red", "triangle", "left", "blue"),
        ("green", "circle", "up", "white"),
        ("blue", "square", "down", "white"),
    )
]
Maps = list[dict[str, dict[str, NDArray[Any]]]]  # per clip: direction -> word -> [5, 8, 8]


def rates(clips: Sequence[NDArray[np.uint8]], truths: Sequence[tuple[str, str, str]]) -> dict[str, float]:
    """How often the rules read the color, shape and direction that they should."""
    verdicts = [scene.classify(clip) for clip in clips]
    names = ("color", "shape", "direction")
    right = [
        [verdict is not None and getattr(verdict, name) == wanted for name, wanted in zip(names, truth, strict=True)]
        for verdict, truth in zip(verdicts, truths, strict=True)
    ]
    return dict(zip((*names, "all"), np.mean([[*row, all(row)] for row in right], axis=0).tolist(), strict=True))


def check_rules(count: int) -> dict[str, Any]:
    """The rules on drawn clips, and on the same clips through the autoencoder."""
    rng = np.random.default_rng(2024)
    scenes = [scene.sample(rng, pair=0.0) for _ in range(count)]
    truths = [(one.things[0].color, one.things[0].shape, one.things[0].direction) for one in scenes]
    clips, vae = [scene.render(one) for one in scenes], load_vae(FOLDER / "vae")
    rebuilt: list[NDArray[np.uint8]] = []
    with torch.no_grad():
        for start in range(0, count, BATCH):
            pixels = to_pixels(np.stack(clips[start : start + BATCH]))
            rebuilt += list(to_clips(vae.decode(vae.encode(pixels).latent_dist.mean).sample))
    return {"clips": count, "drawn": rates(clips, truths), "through the autoencoder": rates(rebuilt, truths)}


def generate(pipe: Any, prompts: Sequence[str], seed: int) -> tuple[list[NDArray[np.uint8]], Maps]:
    """Clips uint8 [17, 64, 64, 3] and the maps of every word; each clip has its own generator."""
    clips: list[NDArray[np.uint8]] = []
    maps: Maps = []
    for start in range(0, len(prompts), BATCH):
        some = list(prompts[start : start + BATCH])
        generators = [torch.Generator().manual_seed(1000 * seed + start + place) for place in range(len(some))]
        where = probe.Where(steps=probe.Progress(*STEPS), layers=LAYERS)
        readout = probe.WordMaps(*_phrases(some), where=where)
        out = probe.trace(pipe, readout)(prompt=some, generator=generators, num_frames=17, output_type="np").frames
        clips += [np.rint(clip * 255).astype(np.uint8) for clip in out]
        maps += [_collect(readout, place) for place in range(len(some))]
    return clips, maps


def _phrases(prompts: Sequence[str]) -> list[str]:
    """The nouns, and each object's color and noun together."""
    objects = [(color, shape) for prompt in prompts for color, shape, _ in scene.parse(prompt)[0]]
    return sorted({shape for _, shape in objects} | {f"{color} {shape}" for color, shape in objects})


def _collect(readout: probe.WordMaps, prompt: int) -> dict[str, dict[str, NDArray[Any]]]:
    """Means over the recorded sites of one prompt's branch."""
    kept = [(at.branch, found) for at, found in readout.values.items() if at.branch.prompt == prompt]
    words = readout.words_of[kept[0][0]]
    means = {name: np.mean([found[name][0] for _, found in kept], axis=0) for name in ("vt", "tv")}
    return {name: dict(zip(words, mean, strict=True)) for name, mean in means.items()}


def overlap(word_map: NDArray[Any], mask: NDArray[np.bool_]) -> float:
    """IoU of a map, cut by Otsu, with a token mask."""
    inside = word_map > threshold_otsu(word_map)
    return float((inside & mask).sum() / (inside | mask).sum())


def object_tokens(clip: NDArray[np.uint8], color: str) -> NDArray[np.bool_]:
    """The tokens [5, 8, 8] of the object of one color in a generated clip."""
    return scene.token_mask(scene.object_mask(clip, color)) > 0.5


def localise(prompts: Sequence[str], clips: Sequence[NDArray[np.uint8]], maps: Maps, reading: str) -> dict[str, float]:
    """Mean IoU of each prompt's words with its object, and of the same words' maps from another clip."""
    scores: dict[str, list[float]] = {"color and noun": [], "noun": [], "control: other clip": []}
    for place, prompt in enumerate(prompts):
        ((color, shape, _),), _ = scene.parse(prompt)
        mask = object_tokens(clips[place], color)
        if not mask.any():
            continue
        both = f"{color} {shape}"
        scores["color and noun"].append(overlap(maps[place][reading][both], mask))
        scores["noun"].append(overlap(maps[place][reading][shape], mask))
        others = [i for i, found in enumerate(maps) if i != place and both in found[reading]]
        scores["control: other clip"] += [overlap(maps[other][reading][both], mask) for other in others]
    return {name: float(np.mean(values)) for name, values in scores.items() if values}


def bind(pipe: Any, count: int, reading: str) -> dict[str, Any]:
    """Two-object clips: is each object there and as asked, and do its words point to it and not to the other."""
    rng = np.random.default_rng(77)
    prompts = [scene.caption(scene.Scene(scene.sample(rng, pair=1.0).things)) for _ in range(count)]
    clips, maps = generate(pipe, prompts, seed=9)
    present, own, other = [], [], []
    alone: list[NDArray[np.uint8]] = []
    asked: list[tuple[str, str, str]] = []
    for prompt, clip, found in zip(prompts, clips, maps, strict=True):
        objects, _ = scene.parse(prompt)
        masks = [object_tokens(clip, color) for color, _, _ in objects]
        present += [bool(mask.any()) for mask in masks]
        alone += [isolate(clip, color) for color, _, _ in objects]
        asked += objects
        if all(mask.any() for mask in masks):
            for place, (color, shape, _) in enumerate(objects):
                own.append(overlap(found[reading][f"{color} {shape}"], masks[place]))
                other.append(overlap(found[reading][f"{color} {shape}"], masks[1 - place]))
    means = {"both words, own object": own, "control: the other object": other}
    found_there = {"objects present": float(np.mean(present)), "each object as asked": rates(alone, asked)}
    return found_there | {name: float(np.mean(values)) for name, values in means.items() if values}


def isolate(clip: NDArray[np.uint8], color: str) -> NDArray[np.uint8]:
    """The clip with everything but the object of one color painted black."""
    black = np.array(scene.BACKGROUNDS["black"], np.uint8)
    return np.where(scene.object_mask(clip, color)[..., None], clip, black)


def measure(quick: bool) -> dict[str, Any]:
    """Every figure of the model card."""
    torch.manual_seed(0)
    pipe, prompts, seeds = probe.load("miniature", device="cpu"), scene.all_prompts(), (0, 1)
    if quick:
        prompts, seeds = prompts[::5], (0,)
    choosing, found = generate(pipe, CHOOSING[:: 2 if quick else 1], seed=5)
    trial = {name: localise(CHOOSING[:: 2 if quick else 1], choosing, found, name) for name in ("vt", "tv")}
    reading = max(trial, key=lambda name: trial[name]["color and noun"])
    drawn = [generate(pipe, prompts, seed) for seed in seeds]
    clips = [clip for some, _ in drawn for clip in some]
    maps = [one for _, some in drawn for one in some]
    asked = prompts * len(seeds)
    return {
        "rules": check_rules(40 if quick else 200),
        "prompts": len(prompts),
        "seeds": len(seeds),
        "drawn as asked": rates(clips, [scene.parse(prompt)[0][0] for prompt in asked]),
        "reading": reading,
        "word maps": {name: localise(asked, clips, maps, name) for name in ("vt", "tv")},
        "two objects": bind(pipe, 6 if quick else 24, reading),
    }


def lines(value: Any, indent: int = 0) -> list[str]:
    """A nested dict as text."""
    rows = []
    for name, inner in value.items():
        if isinstance(inner, dict):
            rows += [f"{' ' * indent}{name}:", *lines(inner, indent + 2)]
        else:
            rows.append(f"{' ' * indent}{name}: {f'{inner:.3f}' if isinstance(inner, float) else inner}")
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--format", choices=("text", "json"), default="text")
    options = parser.parse_args()
    result = measure(options.quick)
    print(json.dumps(result, indent=2) if options.format == "json" else "\n".join(lines(result)))


if __name__ == "__main__":
    main()
