"""FLUX.1 at toy size."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextModel

from probe.models.load import with_defaults
from tests import tiny
from tests.toys.sd3 import QK_NORMS, SHARP, autoencoder, clip_config, clip_tokenizer

FAMILY = "FLUX"
GUIDED = True
DOUBLE, SINGLE = 2, 3
LAYERS = DOUBLE + SINGLE
BRANCHES = ("cond", "uncond")
CALLS_PER_STEP = LAYERS * len(BRANCHES)
VARIANTS = {"schnell": {"distilled": False}}
PATCHES = 4 * 6


def transformer(distilled: bool = True, dtype: torch.dtype = torch.float32) -> FluxTransformer2DModel:
    """2 double and 3 single layers, 2 heads of 16; `distilled`: it takes guidance as a number (dev, not schnell)."""
    torch.manual_seed(1)
    model = FluxTransformer2DModel(
        in_channels=16,
        num_layers=DOUBLE,
        num_single_layers=SINGLE,
        num_attention_heads=2,
        attention_head_dim=16,
        joint_attention_dim=16,
        pooled_projection_dim=8,
        guidance_embeds=distilled,
        axes_dims_rope=(4, 6, 6),
    )
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=SHARP if name.split(".")[-2] in QK_NORMS else 0.15)
    return model.eval().to(dtype)


def pipeline(distilled: bool = True, dtype: torch.dtype = torch.float32) -> Any:
    """Pictures of 16 x 24 pixels, 4 x 6 patches; 12 T5 tokens."""
    clip, words = clip_tokenizer(), tiny.tokenizer()
    torch.manual_seed(4)
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=distilled),
        vae=autoencoder().to(dtype),
        text_encoder=CLIPTextModel(clip_config(clip, 8)).eval().to(dtype),
        tokenizer=clip,
        text_encoder_2=tiny.text_encoder(len(words), dtype),
        tokenizer_2=words,
        transformer=transformer(distilled, dtype),
    )
    pipe.set_progress_bar_config(disable=True)
    with_defaults(pipe, {"height": 16, "width": 24, "max_sequence_length": tiny.TEXT})
    return pipe


def latents(pipe: Any, prompt: Any = tiny.PROMPT, seed: int = 0, steps: int = 3, **call: Any) -> torch.Tensor:
    """The stock call's packed latents [B, N, C], with true guidance: two forwards a step, the conditional first."""
    generator = torch.Generator().manual_seed(seed)
    negative = tiny.OTHER if isinstance(prompt, str) else [tiny.OTHER] * len(prompt)
    guided = {"true_cfg_scale": 3.0, "negative_prompt": negative}
    call = guided | {"num_inference_steps": steps, "output_type": "latent"} | call
    return pipe(prompt=prompt, generator=generator, **call).images


def place(nth: int, branches: tuple[str, ...] = BRANCHES) -> tuple[int, int, str]:
    """(step, layer, branch) of the nth attention call of the blocks, counted from 0."""
    step, rest = divmod(nth, LAYERS * len(branches))
    branch, layer = divmod(rest, LAYERS)
    return step, layer, branches[branch]
