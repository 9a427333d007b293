"""Wan 2.1 and 2.2, text or picture to video: self attention of the video, then cross attention to 512 text tokens, each
with a softmax of its own; no mask, padding is attended. Wan 2.2 14B has two transformers, one at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from probe.layout import Grid, TokenLayout
from probe.models.family import Attention, Family, Text
from probe.models.noise import noise_like
from probe.models.rope import Rope, by_axis

TEXT = 512
"""Text tokens of a prompt; the models that see a picture find their text by this number."""

PICTURE = 257
"""Tokens of one picture: CLIP's 16 x 16 patches and its class token."""


def _layout(model: Any, inputs: dict[str, Any]) -> TokenLayout:
    """From the forward's own tensors: latents [B, C, F, H, W] and text [B, T, E]. No sequence holds both, so their
    order is only a name; the tokens of a picture are no part of it.
    """
    patches = zip(inputs["hidden_states"].shape[2:], model.config.patch_size, strict=True)
    grid = Grid(*(size // patch for size, patch in patches))
    return TokenLayout("video-text", inputs["encoder_hidden_states"].shape[1], grid)


def _clip(config: Mapping[str, Any], call: Mapping[str, Any]) -> TokenLayout:
    """As the pipeline rounds it: 4 frames to a latent frame; 8 x 8 pixels to a latent pixel, 16 x 16 in Wan 2.2 5B,
    which is the one with 48 latent channels.
    """
    patch_t, height, width = config["patch_size"]
    pixels = 16 if config["out_channels"] == 48 else 8
    frames = call["num_frames"] // 4 + 1
    grid = Grid(frames // patch_t, call["height"] // (pixels * height), call["width"] // (pixels * width))
    return TokenLayout("video-text", call["max_sequence_length"], grid)


def _clean(text: str) -> str:
    """As the pipeline does: HTML entities and white space, and broken letters where ftfy is installed."""
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    return prompt_clean(text)


def _probe_inputs(model: Any) -> dict[str, Any]:
    """Two token frames of 4 x 6 patches, 512 text tokens, and a picture where the model sees one."""
    config, noise = model.config, noise_like(model)
    frames, height, width = config.patch_size
    inputs: dict[str, Any] = {
        "hidden_states": noise(1, config.in_channels, 2 * frames, 4 * height, 6 * width),
        "encoder_hidden_states": noise(1, TEXT, config.text_dim),
        "timestep": torch.tensor([500], device=model.device),
    }
    if config.image_dim is not None:  # the first and last frame are two entries of one position table
        entries, tokens = (2, config.pos_embed_seq_len // 2) if config.pos_embed_seq_len else (1, PICTURE)
        inputs["encoder_hidden_states_image"] = noise(entries, tokens, config.image_dim)
    return inputs


def _rope(model: Any, inputs: dict[str, Any]) -> Rope:
    """One unit per token, from 0."""
    dims = (model.rope.t_dim, model.rope.h_dim, model.rope.w_dim)
    frequencies = by_axis(dims, 10_000.0, inputs["hidden_states"].device)
    return Rope(frequencies, frequencies.new_zeros(3))


WAN = Family(
    name="Wan",
    transformer="WanTransformer3DModel",
    pipelines=("WanPipeline", "WanImageToVideoPipeline"),
    attentions=(Attention("blocks", "attn1", "self"), Attention("blocks", "attn2", "cross")),
    layout=_layout,
    text=(Text(clean=_clean),),
    clip=_clip,
    probe_inputs=_probe_inputs,
    rope=_rope,
    streams=("hidden_states",),
    feed_forwards={"blocks": ("ffn",)},
)
