"""Mochi: video tokens first, one joint attention per block and batch entry on the valid text alone: the padding is cut
out before, so entries differ in length.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from probe.entry import on_device
from probe.layout import Grid, TokenLayout
from probe.models.family import Attention, Family
from probe.models.noise import noise_like
from probe.models.rope import Rope


def _sequence(config: Mapping[str, Any], frames: int, height: int, width: int, text: int) -> TokenLayout:
    """Of latent frames and latent pixels."""
    patch = config["patch_size"]
    return TokenLayout("video-text", text, Grid(frames, height // patch, width // patch))


def _layout(model: Any, inputs: dict[str, Any]) -> TokenLayout:
    """From the forward's own tensors: latents [B, C, F, H, W] and text [B, T, E], padding included."""
    _, _, frames, height, width = inputs["hidden_states"].shape
    return _sequence(model.config, frames, height, width, inputs["encoder_hidden_states"].shape[1])


def _clip(config: Mapping[str, Any], call: Mapping[str, Any]) -> TokenLayout:
    """The autoencoder keeps the first frame and one of six behind it, and one of eight rows and columns. Text: at most
    as much, since padding is left out.
    """
    frames, height, width = (call["num_frames"] - 1) // 6 + 1, call.get("height") or 480, call.get("width") or 848
    return _sequence(config, frames, height // 8, width // 8, call["max_sequence_length"])


def _call_defaults(pipe: Any) -> dict[str, Any]:
    """diffusers assumes 256 text tokens whatever the model."""
    return {"max_sequence_length": pipe.transformer.config.max_sequence_length}


def _probe_inputs(model: Any) -> dict[str, Any]:
    """Two token frames of 4 x 6 patches, and two entries with text of different length."""
    config, noise = model.config, noise_like(model)
    seen = torch.tensor([[True] * 8, [True] * 5 + [False] * 3], device=model.device)
    return {
        "hidden_states": noise(2, config.in_channels, 2, 4 * config.patch_size, 6 * config.patch_size),
        "encoder_hidden_states": noise(2, 8, config.text_embed_dim),
        "encoder_attention_mask": seen,
        "timestep": torch.tensor([500, 500], device=model.device),
    }


def _rope(model: Any, inputs: dict[str, Any]) -> Rope:
    """Learned frequencies. Rows and columns count from the centre, in units that make every picture equally large."""
    _, height, width = _layout(model, inputs).grid.shape
    device, unit = inputs["hidden_states"].device, (model.rope.target_area / (height * width)) ** 0.5
    spacing = on_device((1.0, unit, unit), torch.float32, device)
    origin = on_device((0.0, (1 - height) / 2, (1 - width) / 2), torch.float32, device)
    return Rope(model.pos_frequencies.detach().to(device, torch.float32) * spacing[:, None, None], origin)


MOCHI = Family(
    name="Mochi",
    transformer="MochiTransformer3DModel",
    pipelines=("MochiPipeline",),
    attentions=(Attention("transformer_blocks", "attn1", "joint"),),
    layout=_layout,
    clip=_clip,
    probe_inputs=_probe_inputs,
    rope=_rope,
    feed_forwards={"transformer_blocks": ("ff", "ff_context")},
    ragged=True,
    text_modulates=True,
    call_defaults=_call_defaults,
)
