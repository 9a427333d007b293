"""Mochi at toy size: 3 token frames of 2 x 3 patches, at most 12 text tokens."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLMochi, FlowMatchEulerDiscreteScheduler, MochiPipeline, MochiTransformer3DModel

from probe.models.load import with_defaults
from probe.models.registry import family_of
from tests import tiny

FAMILY = "Mochi"
GUIDED = True
LAYERS = 3
CALLS_PER_STEP = 2 * LAYERS  # one for each half of guidance
MIXERS = ("time_embed.pooler.to_out",)
VARIANTS = {"zeroed-negative": {"force_zeros_for_empty_prompt": True}}  # the unconditional half has no text at all


def transformer() -> MochiTransformer3DModel:
    """2 heads of 16. Stock, all frequencies of the positions are zero."""
    torch.manual_seed(1)
    model = MochiTransformer3DModel(
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=LAYERS,
        pooled_projection_dim=16,
        in_channels=4,
        text_embed_dim=16,
        time_embed_dim=4,
        max_sequence_length=tiny.TEXT,
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


def autoencoder() -> AutoencoderKLMochi:
    """4 latent channels."""
    torch.manual_seed(3)
    widths: Any = (32, 32, 32, 32)
    return AutoencoderKLMochi(
        latent_channels=4,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        layers_per_block=(1, 1, 1, 1, 1),
    ).eval()


def pipeline(**settings: Any) -> Any:
    """13 pixel frames of 32 x 48."""
    words = tiny.tokenizer()
    pipe = MochiPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        vae=autoencoder(),
        text_encoder=tiny.text_encoder(len(words)),
        tokenizer=words,
        transformer=transformer(),
        **settings,
    )
    pipe.set_progress_bar_config(disable=True)
    size = {"height": 32, "width": 48, "num_frames": 13}
    with_defaults(pipe, family_of(pipe.transformer).call_defaults(pipe) | size)
    return pipe


def latents(pipe: Any, prompt: Any = tiny.PROMPT, seed: int = 0, steps: int = 3, **call: Any) -> torch.Tensor:
    """The stock call's latents, guided."""
    call = {"num_inference_steps": steps, "guidance_scale": 3.0, "output_type": "latent"} | call
    return pipe(prompt=prompt, generator=torch.Generator().manual_seed(seed), **call).frames
