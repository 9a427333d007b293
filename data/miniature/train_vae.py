"""Train the miniature's autoencoder from nothing: crops, then whole clips, then normalise, then the decoder alone.

    python data/miniature/train_vae.py --out /tmp/vae --steps 1600 --decoder-steps 300

1. 32-pixel crops around objects, then (the last quarter) whole 64-pixel clips: squared plus absolute error,
   pixels near an object weighing six times as much, and a small KL term.
2. The latents' mean and deviation are folded into the weights, because the pipeline knows one scaling factor
   and no mean: exact in the encoder, exact but for the padded borders in the decoder.
3. The encoder is frozen and the decoder trained on, on slightly noisy latents.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLCogVideoX
from model import build_vae, to_pixels
from torch import Tensor

from recipes import scene

NEAR_WEIGHT, KL_WEIGHT, ABSOLUTE_WEIGHT = 5.0, 3e-4, 0.5
LATENT_NOISE = 0.05
CROP, CROP_FRAMES = 32, 9
SCALING_FACTOR = 1.15258426  # any constant would do; the latents are brought to it in step 2


def draw(count: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Pixels [B, 3, F, H, W] and their loss weights [B, 1, F, H, W]."""
    scenes = [scene.sample(rng, pair=0.6) for _ in range(count)]
    inside = torch.tensor(np.stack([scene.masks(one).any(0) for one in scenes])).float()
    weights = 1 + NEAR_WEIGHT * F.max_pool2d(inside, 7, 1, 3)
    return to_pixels(np.stack([scene.render(one) for one in scenes])), weights[:, None]


def crop(pixels: Tensor, weights: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Per clip, the most object-rich of three random windows of 9 frames and 32 x 32 pixels."""
    parts = []
    for clip, weight in zip(pixels, weights, strict=True):
        windows = []
        for _ in range(3):
            start, (top, left) = int(rng.integers(0, 9)), (4 * rng.integers(0, 9, 2)).tolist()
            windows.append((..., slice(start, start + CROP_FRAMES), slice(top, top + CROP), slice(left, left + CROP)))
        best = max(windows, key=lambda window: float(weight[window].sum()))
        parts.append((clip[best], weight[best]))
    return torch.stack([clip for clip, _ in parts]), torch.stack([weight for _, weight in parts])


def rebuild_loss(rebuilt: Tensor, pixels: Tensor, weights: Tensor) -> Tensor:
    """Weighted squared plus absolute error."""
    error = rebuilt.float() - pixels
    return (weights * error**2).mean() + ABSOLUTE_WEIGHT * (weights * error.abs()).mean()


def rate(step: int, steps: int, peak: float) -> float:
    """Warm up over 30 steps, then a cosine to 3 % of the peak."""
    return peak * min(1.0, (step + 1) / 30) * (0.03 + 0.97 * 0.5 * (1 + np.cos(np.pi * step / steps)))


def apply(optimizer: torch.optim.Optimizer, loss: Tensor, pace: float) -> None:
    """One clipped update at the given learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = pace
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()


def train_both(vae: AutoencoderKLCogVideoX, steps: int, rng: np.random.Generator) -> None:
    """Step 1: encoder and decoder."""
    optimizer = torch.optim.AdamW(vae.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=1e-4)
    for step in range(steps):
        whole = step >= 0.75 * steps
        pixels, weights = draw(2 if whole else 4, rng)
        if not whole:
            pixels, weights = crop(pixels, weights, rng)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            guess = vae.encode(pixels).latent_dist
            mean, spread = guess.mean.float(), guess.logvar.float()
            rebuilt = vae.decode(mean + torch.randn_like(mean) * (spread / 2).exp()).sample
        divergence = 0.5 * (mean**2 + spread.exp() - 1 - spread).mean()
        loss = rebuild_loss(rebuilt, pixels, weights) + KL_WEIGHT * divergence
        apply(optimizer, loss, rate(step, steps, 2e-3))
        if step % 50 == 49:
            print(f"both {step + 1} loss {loss.item():.4f} divergence {divergence.item():.3f}", flush=True)


@torch.no_grad()
def normalise(vae: AutoencoderKLCogVideoX, rng: np.random.Generator, clips: int = 48) -> None:
    """Step 2: give every latent channel mean 0 and deviation 1 / scaling factor."""
    latents = torch.cat([vae.encode(draw(4, rng)[0]).latent_dist.mean for _ in range(clips // 4)])
    mean, spread = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4)) * SCALING_FACTOR
    out, channels = vae.encoder.conv_out.conv, len(mean)
    out.weight[:channels] /= spread.view(-1, 1, 1, 1, 1)
    out.bias[:channels] = (out.bias[:channels] - mean) / spread
    out.bias[channels:] -= 2 * spread.log()
    readers = [vae.decoder.conv_in.conv]
    for module in vae.decoder.modules():
        if type(module).__name__ == "CogVideoXSpatialNorm3D":
            readers += [module.conv_y.conv, module.conv_b.conv]
    for conv in readers:
        conv.bias += conv.weight.sum((2, 3, 4)) @ mean
        conv.weight *= spread.view(1, -1, 1, 1, 1)
    vae.register_to_config(scaling_factor=SCALING_FACTOR)


def train_decoder(vae: AutoencoderKLCogVideoX, steps: int, rng: np.random.Generator) -> None:
    """Step 3: the decoder alone, on whole clips."""
    vae.encoder.requires_grad_(False)
    optimizer = torch.optim.AdamW(vae.decoder.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(steps):
        pixels, weights = draw(1, rng)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with torch.no_grad():
                mean = vae.encode(pixels).latent_dist.mean.float()
            rebuilt = vae.decode(mean + LATENT_NOISE * torch.randn_like(mean)).sample
        loss = rebuild_loss(rebuilt, pixels, weights)
        apply(optimizer, loss, rate(step, steps, 6e-4))
        if step % 50 == 49:
            print(f"decoder {step + 1} loss {loss.item():.4f}", flush=True)


def main() -> None:
    """Run the three steps, or with ``--init`` the last one only."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--init", type=Path, help="an autoencoder whose decoder alone is to be trained on")
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--decoder-steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    rng = np.random.default_rng(options.seed)
    if options.init:
        vae = AutoencoderKLCogVideoX.from_pretrained(options.init, torch_dtype=torch.float32)
    else:
        vae = build_vae()
        train_both(vae, options.steps, rng)
        normalise(vae, rng)
    train_decoder(vae, options.decoder_steps, rng)
    vae.half().save_pretrained(options.out, safe_serialization=True)


if __name__ == "__main__":
    main()
