"""Train the small CLIP of ``data/miniature/features`` on single frames of drawn clips and their captions.

    python data/miniature/train_features.py --out data/miniature/features

Half of a pool of scenes are drawn at random; each has a near neighbour in which one color, shape or the background
is another, so that every batch holds captions that are nearly right. A quarter of each batch went through the
miniature's autoencoder. One frame does not show a direction: the captions name random ones, or none.
"""

from __future__ import annotations

import argparse
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from model import FOLDER, build_tokenizer, load_vae, to_clips, to_pixels
from numpy.typing import NDArray
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from recipes import scene

SIZE, PATCH, WIDTH, PROJECTED = 64, 8, 64, 32
FRAMES = 9  # of each clip in the pool
Content = tuple[frozenset[tuple[str, str]], str]


def build_model(tokenizer: Any) -> CLIPModel:
    """Pictures of 64 px in patches of 8, three layers of 64; text of 20 tokens, two layers of 64."""
    own = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": 4, "projection_dim": PROJECTED}
    text = {
        "vocab_size": len(tokenizer),
        "num_hidden_layers": 2,
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.eos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {"num_hidden_layers": 3, "image_size": SIZE, "patch_size": PATCH}
    return CLIPModel(CLIPConfig(text_config=own | text, vision_config=own | vision, projection_dim=PROJECTED))


def build_processor() -> CLIPImageProcessorPil:
    """Short side to 64, bicubic; grey levels from -1 to 1."""
    return CLIPImageProcessorPil(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )


@dataclass
class Pool:
    """Scenes in neighbouring pairs (2k, 2k + 1) and frames of each, uint8 [scenes, FRAMES, H, W, 3]."""

    scenes: list[scene.Scene]
    frames: NDArray[np.uint8]


def draw(pairs: int, through: int, rng: np.random.Generator) -> Pool:
    """Scenes and their neighbours; the clips of the first `through` pairs go through the autoencoder."""
    scenes, vae = [one for _ in range(pairs) for one in _pair(rng)], load_vae(FOLDER / "vae")
    clips = [scene.render(one) for one in scenes]
    clips[: 2 * through] = [rebuilt(vae, clip) for clip in clips[: 2 * through]]
    return Pool(scenes, np.stack(clips))


@torch.no_grad()
def rebuilt(vae: Any, clip: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A clip through the miniature's autoencoder."""
    return to_clips(vae.decode(vae.encode(to_pixels(clip[None])).latent_dist.mean).sample)[0]


def _pair(rng: np.random.Generator) -> tuple[scene.Scene, scene.Scene]:
    """A scene, and the same with one thing changed, or with the colors of its two things exchanged."""
    one = scene.sample(rng, pair=0.5, frames=FRAMES)
    if rng.random() < 0.3:
        others = [name for name in scene.BACKGROUNDS if name != one.background]
        return one, replace(one, background=str(rng.choice(others)))
    things = list(one.things)
    if len(things) == 2 and rng.random() < 0.4 and things[0].shape != things[1].shape:
        first, second = things
        return one, replace(one, things=(replace(first, color=second.color), replace(second, color=first.color)))
    at = int(rng.integers(len(things)))
    if rng.random() < 0.5:
        shapes = [name for name in scene.SHAPES if name != things[at].shape]
        things[at] = replace(things[at], shape=str(rng.choice(shapes)))
    else:
        used = {thing.color for thing in things}
        things[at] = replace(things[at], color=str(rng.choice([name for name in scene.COLORS if name not in used])))
    return one, replace(one, things=tuple(things))


def content(one: scene.Scene) -> Content:
    """What a single frame shows."""
    return frozenset((thing.color, thing.shape) for thing in one.things), one.background


def caption(one: scene.Scene, rng: np.random.Generator) -> str:
    """A caption in any order and with any direction, or none."""
    things = [replace(thing, direction=str(rng.choice(list(scene.DIRECTIONS)))) for thing in one.things]
    rng.shuffle(things)  # type: ignore[arg-type]
    text = scene.caption(replace(one, things=tuple(things)), rng)
    return re.sub(r" moving \w+", "", text) if rng.random() < 0.2 else text


def spoiled(pixels: Tensor, rng: torch.Generator) -> Tensor:
    """Half of the pictures [B, 3, H, W] in [-1, 1] slightly blurred, half noisy, all a little darker or brighter."""
    count = len(pixels)
    blurred = F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, 1)
    share, level, light = (torch.rand(count, 1, 1, 1, generator=rng) for _ in range(3))
    pixels = torch.lerp(pixels, blurred, (2 * share - 1).clamp(min=0))
    noise = torch.randn(pixels.shape, generator=rng)
    return pixels + 0.08 * (2 * level - 1).clamp(min=0) * noise + 0.1 * (light - 0.5)


def loss_of(model: CLIPModel, pixels: Tensor, ids: Tensor, mask: Tensor, contents: Sequence[Content]) -> Tensor:
    """Contrastive loss in both directions; entries that show the same are all right answers."""
    images = F.normalize(model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
    texts = F.normalize(model.get_text_features(input_ids=ids, attention_mask=mask).pooler_output, dim=-1)
    logits = model.logit_scale.exp().clamp(max=50) * images @ texts.T
    same = torch.tensor([[float(a == b) for b in contents] for a in contents])
    wanted = same / same.sum(1, keepdim=True)
    return (F.cross_entropy(logits, wanted) + F.cross_entropy(logits.T, wanted)) / 2


def train(options: argparse.Namespace) -> None:
    """Train from nothing and write the folder."""
    torch.manual_seed(options.seed)
    rng, noise = np.random.default_rng(options.seed), torch.Generator().manual_seed(options.seed)
    tokenizer = build_tokenizer()
    model, began = build_model(tokenizer), time.time()
    pool = draw(options.pairs, options.through, rng)
    print(f"{2 * options.pairs} scenes, {time.time() - began:.0f} s", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.rate, betas=(0.9, 0.98), weight_decay=0.05)
    steps = options.steps
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 100, 0.5 + 0.5 * float(np.cos(np.pi * step / steps)))
    )
    for step in range(steps):
        half, quarter = options.batch // 2, options.batch // 8
        firsts = np.concatenate([rng.choice(options.through, quarter), rng.choice(options.pairs, half - quarter)])
        chosen = np.stack([2 * firsts, 2 * firsts + 1], 1).reshape(-1)
        frames = pool.frames[chosen, rng.integers(0, FRAMES, len(chosen))]
        pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 127.5 - 1
        scenes = [pool.scenes[number] for number in chosen]
        told = tokenizer([caption(one, rng) for one in scenes], padding="max_length", return_tensors="pt")
        contents = [content(one) for one in scenes]
        loss = loss_of(model, spoiled(pixels, noise), told.input_ids, told.attention_mask, contents)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step}  loss {loss.item():.3f}  {time.time() - began:.0f} s", flush=True)
    write(model.eval(), tokenizer, Path(options.out))


def write(model: CLIPModel, tokenizer: Any, folder: Path) -> None:
    """Weights in float16, the configuration, the picture processor and the tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(folder)
    build_processor().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(FOLDER / "tokenizer" / name, folder / name)


def main() -> None:
    """Read the options and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--pairs", type=int, default=3000)
    parser.add_argument("--through", type=int, default=200)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    torch.set_num_threads(1)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
