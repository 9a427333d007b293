"""Training clips: drawn, described, encoded, and held in memory as one batch.

B entries; T, C, h, w the latent's frames, channels, rows and columns; N_video = 320 video tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLCogVideoX
from model import encode, tokenize
from torch import Tensor

from recipes import scene

NEAR_WEIGHT = 5.0  # extra loss weight of latent cells that touch, or neighbour, an object


@dataclass
class Batch:
    """latents [B, T, C, h, w]; ids [B, 20]; weight [B, T, 1, h, w]; shares [B, 2, N_video]; words [B, 2, 3]."""

    latents: Tensor
    ids: Tensor
    weight: Tensor
    shares: Tensor  # per thing: share of each video token it covers, summing to 1; zero where there is no thing
    words: Tensor  # per thing: token positions of its color, noun and direction

    def at(self, index: Tensor) -> Batch:
        """The entries at these places."""
        return Batch(*(part[index] for part in self.parts()))

    def put(self, index: Tensor, other: Batch) -> None:
        """Write another batch over the entries at these places."""
        for mine, theirs in zip(self.parts(), other.parts(), strict=True):
            mine[index] = theirs

    def parts(self) -> list[Tensor]:
        """The tensors in the order of the fields."""
        return [getattr(self, field.name) for field in fields(self)]


def join(batches: list[Batch]) -> Batch:
    """One batch after another."""
    return Batch(*(torch.cat(parts) for parts in zip(*(batch.parts() for batch in batches), strict=True)))


def draw(count: int, rng: np.random.Generator, vae: AutoencoderKLCogVideoX, tokenizer: Any, pair: float) -> Batch:
    """Render, encode and describe ``count`` new clips."""
    scenes = [scene.sample(rng, pair) for _ in range(count)]
    captions = [scene.caption(one, rng) for one in scenes]
    cells, shares, words = [], [], []
    for one, text in zip(scenes, captions, strict=True):
        inside = scene.masks(one)
        cells.append(scene.token_mask(inside.any(0), (5, 16, 16)))
        own = [scene.token_mask(mask, (5, 8, 8)).reshape(-1) for mask in inside]
        own = [share / share.sum() for share in own] + [np.zeros(320)] * (2 - len(own))
        shares.append(np.stack(own))
        verbs = [place for place, word in enumerate(text.split()) if word == "moving"]
        words.append([[place - 2, place - 1, place + 1] for place in (verbs * 2)[:2]])
    touched = torch.tensor(np.stack(cells)).gt(0.02).float()  # [B, T, h, w]
    weight = 1 + NEAR_WEIGHT * F.max_pool2d(touched, 3, 1, 1)
    weight = weight / weight.mean((1, 2, 3), keepdim=True)
    latents = encode(vae, np.stack([scene.render(one) for one in scenes])).half()
    share_tensor = torch.tensor(np.stack(shares), dtype=torch.float32)
    return Batch(latents, tokenize(tokenizer, captions), weight[:, :, None], share_tensor, torch.tensor(words))
