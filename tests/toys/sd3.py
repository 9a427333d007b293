"""Stable Diffusion 3 and 3.5 at toy size."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from probe.models.load import with_defaults
from tests import tiny

FAMILY = "SD3"
GUIDED = True
LAYERS = 3
CALLS_PER_STEP = LAYERS  # the halves of guidance are one batch; each dual layer of 3.5 adds one
DUAL = (0, 1)
VARIANTS = {"3.5": {"dual": DUAL}}
CLIP, PATCHES = 77, 4 * 6
QK_NORMS, SHARP = ("norm_q", "norm_k", "norm_added_q", "norm_added_k"), 1.5
"""Weights of the norms of q and k, large enough that the attention is far from uniform."""


def transformer(dual: tuple[int, ...] = (), dtype: torch.dtype = torch.float32) -> SD3Transformer2DModel:
    """3 layers, 2 heads of 16; pictures of 8 x 12 latent pixels, 4 x 6 patches."""
    torch.manual_seed(1)
    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=LAYERS,
        num_attention_heads=2,
        attention_head_dim=16,
        caption_projection_dim=32,
        joint_attention_dim=16,
        pooled_projection_dim=12,
        pos_embed_max_size=12,
        dual_attention_layers=dual,
        qk_norm="rms_norm" if dual else None,
    )
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=SHARP if name.split(".")[-2] in QK_NORMS else 0.15)
    return model.eval().to(dtype)


def clip_tokenizer() -> CLIPTokenizer:
    """One piece per known word; "grass" is cut into three. 77 tokens, padded with the end."""
    letters = sorted(set("".join(tiny.WORDS)))
    whole = [[*word[:-1], word[-1] + "</w>"] for word in tiny.WORDS if word != "grass"] + [["g", "r"], ["a", "s"]]
    merges = dict.fromkeys(("".join(w[:n]), w[n]) for w in whole for n in range(1, len(w)))
    pieces = [*letters, *(letter + "</w>" for letter in letters), *("".join(merge) for merge in merges)]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys([*pieces, "<|startoftext|>", "<|endoftext|>"]))}
    return CLIPTokenizer(vocab=vocab, merges=list(merges), model_max_length=CLIP)


def clip_config(words: CLIPTokenizer, width: int) -> CLIPTextConfig:
    """Two causal layers of `width`."""
    return CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=16,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CLIP,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )


def autoencoder() -> AutoencoderKL:
    """4 latent channels, 2 x in space."""
    torch.manual_seed(3)
    return AutoencoderKL(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        sample_size=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.06,
        scaling_factor=1.5,
    ).eval()


def pipeline(dual: tuple[int, ...] = (), t5: bool = True, dtype: torch.dtype = torch.float32) -> Any:
    """Pictures of 16 x 24 pixels, 4 x 6 patches; 77 CLIP and 12 T5 tokens. In the layers `dual` the image also attends
    to itself; without `t5` its encoder is not loaded.
    """
    clip, words = clip_tokenizer(), tiny.tokenizer()
    torch.manual_seed(4)
    small, large = (CLIPTextModelWithProjection(clip_config(clip, width)).eval().to(dtype) for width in (4, 8))
    pipe = StableDiffusion3Pipeline(
        transformer=transformer(dual, dtype),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder().to(dtype),
        text_encoder=small,
        tokenizer=clip,
        text_encoder_2=large,
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=tiny.text_encoder(len(words), dtype) if t5 else None,
        tokenizer_3=words if t5 else None,
    )
    pipe.set_progress_bar_config(disable=True)
    with_defaults(pipe, {"height": 16, "width": 24, "max_sequence_length": tiny.TEXT})
    return pipe


def latents(pipe: Any, prompt: Any = tiny.PROMPT, seed: int = 0, steps: int = 3, **call: Any) -> torch.Tensor:
    """The stock call's latents, guided: batches of [unconditional.., conditional..]."""
    generator = torch.Generator().manual_seed(seed)
    call = {"num_inference_steps": steps, "guidance_scale": 3.0, "output_type": "latent"} | call
    return pipe(prompt=prompt, generator=generator, **call).images


def place(nth: int, dual: tuple[int, ...] = ()) -> tuple[int, int, int]:
    """(step, layer, call of the layer) of the nth attention call of the blocks, counted from 0."""
    calls = [(layer, call) for layer in range(LAYERS) for call in range(1 + (layer in dual))]
    step, rest = divmod(nth, len(calls))
    return step, *calls[rest]
