"""CogVideoX at toy size: sincos positions as 2B, rotary as 5B, and two latent frames per token frame as 1.5."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel

from tests import tiny

FAMILY = "CogVideoX"
GUIDED = True
LAYERS = 2
CALLS_PER_STEP = LAYERS
VARIANTS = {"rotary": {"rotary": True}, "1.5": {"rotary": True, "patch_size_t": 2}}


def pipeline(rotary: bool = False, patch_size_t: int | None = None, layers: int = LAYERS) -> Any:
    """12 text tokens; 3 token frames of 4 x 4 patches, or 2 of 4 x 6 and `patch_size_t` latent frames each."""
    pipe = tiny.pipeline(rotary, layers)
    if patch_size_t:
        torch.manual_seed(1)
        config: Any = pipe.transformer.config
        changed = {"patch_size_t": patch_size_t, "patch_bias": False, "sample_width": 12}  # positions end there
        model: Any = CogVideoXTransformer3DModel.from_config(config, **changed)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.15)
        pipe.register_modules(transformer=model.eval())
    return pipe


def latents(pipe: Any, prompt: Any = tiny.PROMPT, seed: int = 0, steps: int = 3, **call: Any) -> torch.Tensor:
    """The stock call's latents, guided."""
    return tiny.latents(pipe, prompt, seed, steps, **call)
