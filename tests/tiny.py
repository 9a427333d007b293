"""Real diffusers classes at toy size with random weights: quick, and every layer matters."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from probe.models.load import with_defaults
from probe.models.registry import family_of

TEXT = 12
WORDS = ["a", "the", "cat", "dog", "red", "blue", "runs", "sits", "left", "right", "on", "grass", "snow", "and"]
PROMPT, OTHER = "a red cat runs left", "a blue dog sits on snow"


def transformer(
    rotary: bool = False, layers: int = 3, dtype: torch.dtype = torch.float32
) -> CogVideoXTransformer3DModel:
    """3 layers, 2 heads of 16; clips of 3 latent frames, 8 x 8 latent pixels, 4 x 4 patches."""
    torch.manual_seed(1)
    model = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=16,
        num_layers=layers,
        sample_width=8,
        sample_height=8,
        sample_frames=9,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=TEXT,
        use_rotary_positional_embeddings=rotary,
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model.eval().to(dtype)


def tokenizer() -> T5Tokenizer:
    """One piece per known word; "grass" is cut into three."""
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocab += [("▁" + word, -1.0) for word in WORDS if word != "grass"] + [("▁gr", -1.0), ("as", -1.0), ("s", -1.0)]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=TEXT)


def text_encoder(vocabulary: int, dtype: torch.dtype = torch.float32) -> T5EncoderModel:
    """One layer of width 16."""
    torch.manual_seed(2)
    config = T5Config(
        vocab_size=vocabulary,
        d_model=16,
        d_kv=8,
        d_ff=16,
        num_layers=1,
        num_heads=2,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
        tie_word_embeddings=False,
    )
    return T5EncoderModel(config).eval().to(dtype)


def autoencoder() -> AutoencoderKLCogVideoX:
    """4 latent channels, 4 x in space and time."""
    torch.manual_seed(3)
    return AutoencoderKLCogVideoX(
        block_out_channels=(4, 4, 4),
        down_block_types=("CogVideoXDownBlock3D",) * 3,
        up_block_types=("CogVideoXUpBlock3D",) * 3,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        sample_height=32,
        sample_width=32,
        scaling_factor=1.15,
    ).eval()


def scheduler() -> CogVideoXDDIMScheduler:
    """CogVideoX-2B's configuration."""
    return CogVideoXDDIMScheduler(
        beta_start=0.00085,
        beta_end=0.0120,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        snr_shift_scale=3.0,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )


def pipeline(rotary: bool = False, layers: int = 3, dtype: torch.dtype = torch.float32) -> Any:
    """A whole CogVideoX pipeline that can be called with a prompt; 9 pixel frames of 32 x 32."""
    words = tokenizer()
    parts = (words, text_encoder(len(words), dtype), autoencoder(), transformer(rotary, layers, dtype), scheduler())
    pipe = CogVideoXPipeline(*parts)
    pipe.set_progress_bar_config(disable=True)
    with_defaults(pipe, family_of(pipe.transformer).call_defaults(pipe))
    return pipe


def latents(pipe: Any, prompt: Any = PROMPT, seed: int = 0, steps: int = 4, **call: Any) -> torch.Tensor:
    """The stock call's latents."""
    generator = torch.Generator().manual_seed(seed)
    call = {"num_inference_steps": steps, "guidance_scale": 3.0, "output_type": "latent"} | call
    return pipe(prompt=prompt, generator=generator, **call).frames
