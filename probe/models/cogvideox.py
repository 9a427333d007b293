"""CogVideoX: 2B (sincos positions), 5B (rotary) and the miniature; text tokens first, one joint attention per block,
no mask.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from probe.layout import Grid, TokenLayout
from probe.models.family import Family
from probe.site import Branch


def clip_frames(config: Mapping[str, Any]) -> int:
    """Latent frames of one clip as the model was trained, from its transformer's configuration."""
    return (config["sample_frames"] - 1) // config.get("temporal_compression_ratio", 4) + 1


def layout_of(config: Mapping[str, Any], frames: int, height: int, width: int, text: int) -> TokenLayout:
    """The joint sequence of `frames` latent frames of `height` x `width` latent pixels and `text` tokens."""
    patch, patch_t = config["patch_size"], config.get("patch_size_t") or 1
    return TokenLayout("text-video", text, Grid(-(-frames // patch_t), height // patch, width // patch))


def _layout(model: nn.Module, inputs: dict[str, Any]) -> TokenLayout:
    """From the forward's own tensors: latents [B, F, C, H, W] and text [B, T, E]."""
    config: Any = model.config
    _, frames, _, height, width = inputs["hidden_states"].shape
    return layout_of(config, frames, height, width, inputs["encoder_hidden_states"].shape[1])


def _text_length(model: nn.Module) -> int:
    config: Any = model.config
    return config.max_text_seq_length


def _branches(batch: int, prompts: int | None, pipe: Any) -> tuple[Branch, ...]:
    """A stock call batches [unconditional.., conditional..], or the conditional half alone when guidance is off."""
    halves = (False, True) if (batch == 2 * prompts if prompts else pipe.guidance_scale > 1) else (True,)
    each = batch // len(halves)
    return tuple(Branch(prompt=i % (prompts or each), guided=guided) for guided in halves for i in range(each))


def _call_defaults(pipe: Any) -> dict[str, Any]:
    """diffusers assumes 226 text tokens whatever the model."""
    return {"max_sequence_length": _text_length(pipe.transformer)}


def _probe_inputs(pipe: Any) -> dict[str, Any]:
    """Random inputs of two token frames of 4 x 6 patches, so that a check is quick at any model size; learned positions
    hold for the model's own size only, which is then used.
    """
    model = pipe.transformer
    config, parameter = model.config, next(model.parameters())
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(parameter)

    frames, height, width = 2 * (config.patch_size_t or 1), 4 * config.patch_size, 6 * config.patch_size
    if config.use_learned_positional_embeddings:
        frames = clip_frames(config)
        height, width = config.sample_height, config.sample_width
    inputs: dict[str, Any] = {
        "hidden_states": noise(1, frames, config.in_channels, height, width),
        "encoder_hidden_states": noise(1, config.max_text_seq_length, config.text_embed_dim),
        "timestep": torch.tensor([500], device=parameter.device),
    }
    if config.use_rotary_positional_embeddings:
        scale = pipe.vae_scale_factor_spatial
        size = height * scale, width * scale, frames, parameter.device
        inputs["image_rotary_emb"] = pipe._prepare_rotary_positional_embeddings(*size)
    return inputs


COGVIDEOX = Family(
    name="cogvideox",
    transformer="CogVideoXTransformer3DModel",
    pipelines=("CogVideoXPipeline",),
    blocks="transformer_blocks",
    attention="attn1",
    layout=_layout,
    text_length=_text_length,
    branches=_branches,
    call_defaults=_call_defaults,
    probe_inputs=_probe_inputs,
)
