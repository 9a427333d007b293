"""What a model's configuration says of its size: numbers only, before any weight is loaded."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from probe.errors import ModelError
from probe.layout import TokenLayout
from probe.models.cogvideox import COGVIDEOX, clip_frames, padding_frames
from probe.models.family import Family


@dataclass(frozen=True)
class Clip:
    """What our own loop must know of a clip: latent frames, pixel frames per latent frame, values of a latent frame,
    and the latent frames that are not shown (`padding_frames`).
    """

    frames: int
    compression: int
    latent_values: int
    padding: int = 0

    def pixel_frames(self, frames: int) -> int:
        """Pixel frames of so many latent frames."""
        return int(self.pixels_before(frames))

    def pixels_before(self, latent: float) -> float:
        """Pixel frames before a place in latent frames: the first is one of them, each other as many as fit."""
        return max(0.0, self.compression * (latent - self.padding - 1) + 1)

    def latents_of(self, pixels: float, first: bool) -> float:
        """Latent frames of so many pixel frames, from the beginning of the video or further on."""
        return (pixels - 1) / self.compression + 1 + self.padding if first else pixels / self.compression


@dataclass(frozen=True)
class Size:
    """What the configuration of a model says: its family, layers, heads and their width, the sequence of one clip or
    picture, whether it rotates queries and keys by position. `clip` is None for a family that runs through its stock
    pipeline.
    """

    family: Family
    layers: int
    heads: int
    width: int
    layout: TokenLayout
    clip: Clip | None
    rope: bool


def call_defaults(family: Family) -> dict[str, Any]:
    """The arguments of the stock pipeline's call that have a default."""
    import diffusers

    arguments = inspect.signature(getattr(diffusers, family.pipelines[0]).__call__).parameters.values()
    return {argument.name: argument.default for argument in arguments if argument.default is not argument.empty}


def pixels_of(model: str, config: Mapping[str, Any], clip: Clip) -> tuple[int, int, int]:
    """Frames, rows and columns of a clip of a CogVideoX pipeline in pixels; its autoencoder's configuration is read.

    Raises:
        ModelError: it cannot be read.
    """
    from diffusers import AutoencoderKLCogVideoX

    try:
        vae: Any = AutoencoderKLCogVideoX.load_config(model, subfolder="vae")
        scale = 2 ** (len(vae["block_out_channels"]) - 1)
    except (OSError, KeyError, ValueError) as error:
        raise ModelError(
            f"A model that edits a video must have an autoencoder. Got {model} without a readable vae/config.json. "
            "Name a whole pipeline."
        ) from error
    if clip.padding:
        raise ModelError(
            f"A model that edits a video must show every frame it denoises. Got {model}, which leaves out "
            f"{clip.padding}. Take CogVideoX 1.0."
        )
    return clip.pixel_frames(clip.frames), config["sample_height"] * scale, config["sample_width"] * scale


def size_of(family: Family, config: Mapping[str, Any], call: Mapping[str, Any]) -> Size:
    """From a model's configuration and the arguments of its pipeline's call."""
    clip = None
    if family is COGVIDEOX:
        frames = clip_frames(config)
        values = config["in_channels"] * config["sample_height"] * config["sample_width"]
        clip = Clip(frames, config.get("temporal_compression_ratio", 4), values, padding_frames(config))
    layers = sum(config.get(name) or 0 for name in ("num_layers", "num_single_layers"))
    heads, width = config["num_attention_heads"], config["attention_head_dim"]
    rotates = family.rope is not Family.rope and config.get("use_rotary_positional_embeddings", True)
    return Size(family, layers, heads, width, family.clip(config, call), clip, rotates)
