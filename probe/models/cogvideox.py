"""CogVideoX: 2B (sincos positions), 5B (rotary), 1.5 (two latent frames per token frame) and the miniature; text tokens
first, one joint attention per block, no mask: padding is attended.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import torch

from probe.layout import Grid, TokenLayout
from probe.models.family import Attention, Family
from probe.models.noise import noise_like
from probe.models.rope import Rope, by_axis


def clip_frames(config: Mapping[str, Any]) -> int:
    """Latent frames of one clip as the model was trained, from its transformer's configuration. Where a token frame is
    several latent frames (1.5: 2) these are whole groups, the first of which `padding_frames` fill up.
    """
    return (config["sample_frames"] - 1) // config.get("temporal_compression_ratio", 4) + 1 + padding_frames(config)


def padding_frames(config: Mapping[str, Any]) -> int:
    """Latent frames at the beginning that are denoised but not shown, as the stock pipeline leaves them out."""
    shown = (config["sample_frames"] - 1) // config.get("temporal_compression_ratio", 4) + 1
    return -shown % (config.get("patch_size_t") or 1)


def layout_of(config: Mapping[str, Any], frames: int, height: int, width: int, text: int) -> TokenLayout:
    """The joint sequence of `frames` latent frames of `height` x `width` latent pixels and `text` tokens."""
    patch, patch_t = config["patch_size"], config.get("patch_size_t") or 1
    return TokenLayout("text-video", text, Grid(-(-frames // patch_t), height // patch, width // patch))


def _layout(model: Any, inputs: dict[str, Any]) -> TokenLayout:
    """From the forward's own tensors: latents [B, F, C, H, W] and text [B, T, E]."""
    _, frames, _, height, width = inputs["hidden_states"].shape
    return layout_of(model.config, frames, height, width, inputs["encoder_hidden_states"].shape[1])


def _clip(config: Mapping[str, Any], _: Mapping[str, Any]) -> TokenLayout:
    """A clip as the model was trained, whatever the call says."""
    size = clip_frames(config), config["sample_height"], config["sample_width"]
    return layout_of(config, *size, config["max_text_seq_length"])


def _call_defaults(pipe: Any) -> dict[str, Any]:
    """diffusers assumes 226 text tokens whatever the model."""
    return {"max_sequence_length": pipe.transformer.config.max_text_seq_length}


def _probe_inputs(model: Any) -> dict[str, Any]:
    """Two token frames of 4 x 6 patches, so that a check is quick at any model size; learned positions hold for the
    model's own size only, which is then used.
    """
    config, noise = model.config, noise_like(model)
    frames, height, width = 2 * (config.patch_size_t or 1), 4 * config.patch_size, 6 * config.patch_size
    if config.use_learned_positional_embeddings:
        frames, height, width = clip_frames(config), config.sample_height, config.sample_width
    inputs: dict[str, Any] = {
        "hidden_states": noise(1, frames, config.in_channels, height, width),
        "encoder_hidden_states": noise(1, config.max_text_seq_length, config.text_embed_dim),
        "timestep": torch.tensor([500], device=model.device),
    }
    if config.use_rotary_positional_embeddings:
        inputs["image_rotary_emb"] = _rotary(model, height, width, frames)
    return inputs


def _rotary(model: Any, height: int, width: int, frames: int) -> Any:
    """As the pipeline makes them, at a spatial compression of 8."""
    from diffusers import CogVideoXPipeline

    pipe: Any = SimpleNamespace(transformer=model, vae_scale_factor_spatial=8)
    make = CogVideoXPipeline._prepare_rotary_positional_embeddings
    return make(pipe, height * 8, width * 8, frames, model.device)


def _rope(model: Any, inputs: dict[str, Any]) -> Rope | None:
    """The positions of the first and the last token are read from the table [N, D] that the forward is given, at the
    slowest pair of each axis, which is far from a full turn.
    """
    if inputs.get("image_rotary_emb") is None:
        return None
    (cos, sin), channels = inputs["image_rotary_emb"], model.config.attention_head_dim
    dims = (channels // 4, channels // 8 * 3, channels // 8 * 3)
    plain, slowest = by_axis(dims, 10_000.0, cos.device), [end // 2 - 1 for end in accumulate(dims)]
    turned = torch.stack([torch.atan2(sin[:, 2 * pair], cos[:, 2 * pair]) for pair in slowest], -1)
    slow = torch.stack([plain[axis, 0, pair] for axis, pair in enumerate(slowest)])
    first, last = turned[0] / slow, turned[-1] / slow
    sizes = _layout(model, inputs).grid.shape
    steps = [
        (last[axis] - first[axis]) / (n - 1) if n > 1 else torch.ones_like(slow[0]) for axis, n in enumerate(sizes)
    ]
    spacing = torch.stack(steps)
    return Rope(plain * spacing[:, None, None], first / spacing)


COGVIDEOX = Family(
    name="CogVideoX",
    transformer="CogVideoXTransformer3DModel",
    pipelines=("CogVideoXPipeline",),
    attentions=(Attention("transformer_blocks", "attn1", "joint"),),
    layout=_layout,
    several="",
    clip=_clip,
    frame_axis=1,
    call_defaults=_call_defaults,
    probe_inputs=_probe_inputs,
    rope=_rope,
    feed_forwards={"transformer_blocks": ("ff",)},
)
