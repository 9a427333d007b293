"""Stable Diffusion 3 and 3.5: pictures; image tokens first, one joint attention per block, no mask: padding is
attended.

The text is 77 CLIP tokens, then T5 tokens: a word has a place in both. The two CLIP encoders see the same 77 tokens and
share their rows (features side by side); without the T5 encoder its rows are zeros, that is padding. The text rows of
the last block attend, but nothing reads what they give. In some blocks of 3.5-medium the image also attends to itself
alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from probe.layout import Grid, TokenLayout
from probe.models.family import Attention, Family, Text
from probe.models.noise import noise_like

CLIP = 77
"""Tokens of the CLIP tokenizer in every released model."""


def _layout(model: Any, inputs: dict[str, Any]) -> TokenLayout:
    """From the forward's own tensors: latents [B, C, H, W] and text [B, T, E]."""
    height, width = inputs["hidden_states"].shape[-2:]
    patch = model.config.patch_size
    return TokenLayout("video-text", inputs["encoder_hidden_states"].shape[1], Grid(1, height // patch, width // patch))


def _clip(config: Mapping[str, Any], call: Mapping[str, Any]) -> TokenLayout:
    """A picture of the call's size, else of the model's own, at the released autoencoder's compression of 8."""
    size, patch = config["sample_size"] * 8, config["patch_size"] * 8
    height, width = ((call.get(side) or size) // patch for side in ("height", "width"))
    return TokenLayout("video-text", CLIP + call["max_sequence_length"], Grid(1, height, width))


def _probe_inputs(model: Any) -> dict[str, Any]:
    """4 x 6 patches and 20 text tokens, so that a check is quick at any model size."""
    config, noise = model.config, noise_like(model)
    return {
        "hidden_states": noise(1, config.in_channels, 4 * config.patch_size, 6 * config.patch_size),
        "encoder_hidden_states": noise(1, 20, config.joint_attention_dim),
        "pooled_projections": noise(1, config.pooled_projection_dim),
        "timestep": torch.tensor([500], device=model.device),
    }


SD3 = Family(
    name="SD3",
    transformer="SD3Transformer2DModel",
    pipelines=("StableDiffusion3Pipeline",),
    attentions=(Attention("transformer_blocks", "attn", "joint"), Attention("transformer_blocks", "attn2", "self")),
    layout=_layout,
    several="num_images_per_prompt",
    clip=_clip,
    frame_axis=None,
    text=(
        Text("tokenizer", CLIP, prompts=("prompt", "prompt_2")),
        Text("tokenizer_3", prompts=("prompt_3",), optional=True),
    ),
    probe_inputs=_probe_inputs,
    streams=("encoder_hidden_states", "hidden_states"),
    feed_forwards={"transformer_blocks": ("ff", "ff_context")},
)
