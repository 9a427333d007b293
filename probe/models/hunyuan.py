"""HunyuanVideo: video tokens first; double-stream blocks with projections of their own for text and video, then
single-stream blocks; a key mask hides the padding at the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from probe.errors import UsageError
from probe.layout import Grid, TokenLayout
from probe.models.family import Attention, Family, asked
from probe.models.noise import noise_like
from probe.models.rope import Rope, by_axis
from probe.word import Encoder


class _HunyuanVideo(Family):
    """The family whose text encoder is a language model: the prompt stands in a template whose start is dropped."""

    def encoders(self, pipe: Any, call: Mapping[str, Any]) -> list[Encoder]:
        """The template and its crop as the call gives them, or the pipeline's own."""
        template = asked(pipe, call, "prompt_template")
        if not template.get("crop_start") or "image_emb_len" in template:
            raise UsageError(
                "A prompt template must say its crop_start and hold text alone. Got one with "
                f"{', '.join(sorted(template))}. Leave prompt_template out, and use the text-to-video pipeline."
            )
        length = asked(pipe, call, "max_sequence_length")
        return [Encoder(getattr(pipe, "tokenizer", None), length, template["template"], template["crop_start"])]


def _sequence(config: Mapping[str, Any], frames: int, height: int, width: int, text: int) -> TokenLayout:
    """Of latent frames and latent pixels."""
    patch, patch_t = config["patch_size"], config["patch_size_t"]
    return TokenLayout("video-text", text, Grid(frames // patch_t, height // patch, width // patch))


def _layout(model: Any, inputs: dict[str, Any]) -> TokenLayout:
    """From the forward's own tensors: latents [B, C, F, H, W] and text [B, T, E], padding included."""
    _, _, frames, height, width = inputs["hidden_states"].shape
    return _sequence(model.config, frames, height, width, inputs["encoder_hidden_states"].shape[1])


def _clip(config: Mapping[str, Any], call: Mapping[str, Any]) -> TokenLayout:
    """The autoencoder keeps the first frame and one of four behind it, and one of eight rows and columns."""
    frames = (call["num_frames"] - 1) // 4 + 1
    return _sequence(config, frames, call["height"] // 8, call["width"] // 8, call["max_sequence_length"])


def _probe_inputs(model: Any) -> dict[str, Any]:
    """Two token frames of 4 x 6 patches, and two entries with text of different length."""
    config, noise = model.config, noise_like(model)
    frames, height, width = 2 * config.patch_size_t, 4 * config.patch_size, 6 * config.patch_size
    seen = torch.tensor([[1] * 8, [1] * 5 + [0] * 3], device=model.device)
    return {
        "hidden_states": noise(2, config.in_channels, frames, height, width),
        "encoder_hidden_states": noise(2, 8, config.text_embed_dim),
        "encoder_attention_mask": seen.to(model.dtype),
        "pooled_projections": noise(2, config.pooled_projection_dim),
        "timestep": torch.tensor([500, 500], device=model.device),
        "guidance": torch.tensor([6000, 6000], device=model.device, dtype=model.dtype),
    }


def _rope(model: Any, inputs: dict[str, Any]) -> Rope:
    """One unit per token, from 0."""
    device = inputs["hidden_states"].device
    frequencies = by_axis(tuple(model.rope.rope_dim), model.rope.theta, device)
    return Rope(frequencies, frequencies.new_zeros(3))


HUNYUAN = _HunyuanVideo(
    name="HunyuanVideo",
    transformer="HunyuanVideoTransformer3DModel",
    pipelines=("HunyuanVideoPipeline",),
    attentions=(
        Attention("transformer_blocks", "attn", "double"),
        Attention("single_transformer_blocks", "attn", "single"),
    ),
    layout=_layout,
    clip=_clip,
    probe_inputs=_probe_inputs,
    rope=_rope,
    feed_forwards={"transformer_blocks": ("ff", "ff_context"), "single_transformer_blocks": ("proj_out",)},
)
