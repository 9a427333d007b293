"""The miniature's parts: built from nothing, loaded from a pipeline folder, and written to one.

Shapes: latents float [B, T, C, h, w] = [B, 5, 8, 16, 16] for 17 frames of 64 x 64; text [B, 20, 64].
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel, T5Tokenizer

FOLDER = Path(__file__).resolve().parent
TEXT_LENGTH = 20
WORDS = (
    *("a", "an", "the", "red", "green", "blue", "yellow", "purple", "black", "white", "gray"),
    *("circle", "ball", "square", "box", "triangle", "moving", "right", "left", "up", "down"),
    *("and", "on", "over", "background"),
)


def build_tokenizer() -> T5Tokenizer:
    """One token per word; an unknown word becomes ``<unk>``."""
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)] + [("▁" + word, -1.0) for word in WORDS]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=TEXT_LENGTH)


def build_text_encoder(vocabulary: int) -> T5EncoderModel:
    """Two layers of 64: small enough to be trained from nothing with the transformer."""
    config = T5Config(
        vocab_size=vocabulary,
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        relative_attention_max_distance=64,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
        decoder_start_token_id=0,
        tie_word_embeddings=False,
    )
    return T5EncoderModel(config)


def build_transformer() -> CogVideoXTransformer3DModel:
    """Six layers of 4 x 32; modulation and output start at zero, so the first prediction is zero."""
    model = CogVideoXTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=8,
        out_channels=8,
        time_embed_dim=64,
        text_embed_dim=64,
        num_layers=6,
        sample_width=16,
        sample_height=16,
        sample_frames=17,
        patch_size=2,
        max_text_seq_length=TEXT_LENGTH,
        spatial_interpolation_scale=1.0,
        temporal_interpolation_scale=1.0,
    )
    for weight in model.parameters():
        if weight.ndim >= 2:
            nn.init.xavier_uniform_(weight.view(weight.shape[0], -1))
    gates = [norm.linear for block in model.transformer_blocks for norm in (block.norm1, block.norm2)]
    for layer in (*gates, model.norm_out.linear, model.proj_out):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return model


def build_vae() -> AutoencoderKLCogVideoX:
    """Three blocks: 4 x smaller in space and in time."""
    return AutoencoderKLCogVideoX(
        block_out_channels=(16, 32, 32),
        down_block_types=("CogVideoXDownBlock3D",) * 3,
        up_block_types=("CogVideoXUpBlock3D",) * 3,
        latent_channels=8,
        layers_per_block=1,
        norm_num_groups=4,
        sample_height=64,
        sample_width=64,
        scaling_factor=1.0,
    )


def build_scheduler() -> CogVideoXDDIMScheduler:
    """The 2b model's schedule: v-prediction, no signal at the last timestep."""
    return CogVideoXDDIMScheduler(
        beta_start=0.00085,
        beta_end=0.0120,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        snr_shift_scale=3.0,
        timestep_spacing="trailing",
        clip_sample=False,
    )


def load_vae(folder: Path) -> AutoencoderKLCogVideoX:
    """The autoencoder in float32, frozen."""
    vae = AutoencoderKLCogVideoX.from_pretrained(folder, torch_dtype=torch.float32)
    vae.register_to_config(_name_or_path="vae")  # or the folder would be written into its copies
    return vae.eval().requires_grad_(False)


def tokenize(tokenizer: T5Tokenizer, captions: list[str]) -> Tensor:
    """Ids [B, 20], padded as the pipeline pads."""
    return tokenizer(
        captions, padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt"
    ).input_ids


def to_pixels(clips: np.ndarray) -> Tensor:
    """uint8 [B, F, H, W, 3] -> float [B, 3, F, H, W] in [-1, 1]."""
    return torch.from_numpy(clips).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def to_clips(pixels: Tensor) -> np.ndarray:
    """float [B, 3, F, H, W] in [-1, 1] -> uint8 [B, F, H, W, 3]."""
    return ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 4, 1).numpy()


@torch.no_grad()
def encode(vae: AutoencoderKLCogVideoX, clips: np.ndarray) -> Tensor:
    """uint8 [B, F, H, W, 3] -> scaled latent means [B, T, C, h, w]."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        means = vae.encode(to_pixels(clips)).latent_dist.mean
    return (means.float() * vae.config.scaling_factor).transpose(1, 2)


def export(
    transformer: dict[str, Tensor], text_encoder: dict[str, Tensor], vae: AutoencoderKLCogVideoX, folder: Path
) -> None:
    """Write the pipeline: transformer and autoencoder in float16, text encoder in float32.

    Parts are written beside the target and moved over it one by one, so a reader never sees half a file.
    The text encoder stays in float32 because transformers loads it in its saved dtype and diffusers does not.
    """
    tokenizer = build_tokenizer()
    text, video = build_text_encoder(len(tokenizer)), build_transformer()
    text.load_state_dict(text_encoder)
    video.load_state_dict(transformer)
    pipe = CogVideoXPipeline(tokenizer, text, vae.half(), video.half(), build_scheduler())
    fresh = folder.with_name(folder.name + ".fresh")
    shutil.rmtree(fresh, ignore_errors=True)
    pipe.save_pretrained(fresh, safe_serialization=True)
    for source in sorted(path for path in fresh.rglob("*") if path.is_file()):
        target = folder / source.relative_to(fresh)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(source, target)
    shutil.rmtree(fresh)
