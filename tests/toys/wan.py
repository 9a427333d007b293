"""A whole Wan pipeline at toy size: 2.1 with one transformer, 2.2 with two."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from transformers import UMT5Config, UMT5EncoderModel

from probe.models.load import with_defaults
from probe.models.registry import family_of
from tests import tiny

FAMILY = "Wan"
LAYERS, TEXT, VIDEO = 2, 512, 3 * 4 * 4
BRANCHES = ("cond", "uncond")
KINDS = ("self", "cross")
CALLS_PER_STEP = LAYERS * len(KINDS) * len(BRANCHES)
GUIDED = True
VARIANTS = {"2.2": {"boundary": 0.9}}


def transformer(seed: int = 1, dtype: torch.dtype = torch.float32, **config: Any) -> WanTransformer3DModel:
    """2 layers, 2 heads of 12; in `dtype` as `from_pretrained` casts: some parts stay float32."""
    torch.manual_seed(seed)
    config = {"in_channels": 4, "text_dim": 16, "num_layers": LAYERS} | config
    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        out_channels=4,
        freq_dim=16,
        ffn_dim=32,
        rope_max_seq_len=32,
        **config,
    )
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.15)
        if not any(part in name for part in model._keep_in_fp32_modules):
            parameter.data = parameter.data.to(dtype)
    return model.eval()


def text_encoder(vocabulary: int) -> UMT5EncoderModel:
    """One layer of width 16."""
    torch.manual_seed(2)
    config = UMT5Config(vocab_size=vocabulary, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, dropout_rate=0.0)
    return UMT5EncoderModel(config).eval()


def autoencoder() -> AutoencoderKLWan:
    """4 latent channels, 8 x in space and 4 x in time."""
    torch.manual_seed(3)
    return AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    ).eval()


def scheduler() -> UniPCMultistepScheduler:
    """Wan 2.1's configuration at 480p."""
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def pipeline(boundary: float | None = None, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    """Called with a prompt it makes 9 pixel frames of 64 x 64: a grid of 3 x 4 x 4.

    Below `boundary` of the timesteps a second transformer takes over (Wan 2.2). `config` goes to the pipeline.
    """
    words = tiny.tokenizer()
    parts: dict[str, Any] = {
        "tokenizer": words,
        "text_encoder": text_encoder(len(words)),
        "vae": autoencoder(),
        "scheduler": scheduler(),
        "transformer": transformer(dtype=dtype),
        "transformer_2": None if boundary is None else transformer(seed=4, dtype=dtype),
    }
    pipe = WanPipeline(**parts, boundary_ratio=boundary, **config)
    pipe.set_progress_bar_config(disable=True)
    size = {"height": 64, "width": 64, "num_frames": 9}
    with_defaults(pipe, family_of(pipe.transformer).call_defaults(pipe) | size)
    return pipe


def latents(pipe: Any, prompt: Any = tiny.PROMPT, seed: int = 0, steps: int = 3, **call: Any) -> torch.Tensor:
    """The stock call's latents, guided: two forwards a step."""
    generator = torch.Generator().manual_seed(seed)
    call = {"num_inference_steps": steps, "guidance_scale": 3.0, "output_type": "latent"} | call
    return pipe(prompt=prompt, generator=generator, **call).frames


def place(nth: int) -> tuple[int, int, int, str]:
    """(step, layer, call of the layer, branch) of the nth attention call of the blocks, counted from 0."""
    step, rest = divmod(nth, CALLS_PER_STEP)
    branch, rest = divmod(rest, LAYERS * len(KINDS))
    layer, call = divmod(rest, len(KINDS))
    return step, layer, call, BRANCHES[branch]
