"""HunyuanVideo at toy size: 3 token frames of 2 x 3 patches, 12 text tokens behind the pipeline's own template."""

from __future__ import annotations

import re
from typing import Any

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPTextModel, LlamaConfig, LlamaModel, PreTrainedTokenizerFast

from probe.models.load import with_defaults
from probe.models.registry import family_of
from tests import tiny
from tests.toys.sd3 import clip_config, clip_tokenizer

FAMILY = "HunyuanVideo"
GUIDED = True
LAYERS = 4
CALLS_PER_STEP = 2 * LAYERS  # the conditional forward, then the unconditional one
REFINER = "context_embedder.token_refiner.refiner_blocks.0.attn.to_out.0"
MIXERS = (REFINER, "context_embedder.time_text_embed.text_embedder.linear_2")
PIECES = r"<\|\w+\|>| ?[A-Za-z]+|\d+|[^\w\s]|\s+"


def transformer(dtype: torch.dtype = torch.float32) -> HunyuanVideoTransformer3DModel:
    """2 double-stream and 2 single-stream blocks, 2 heads of 16."""
    torch.manual_seed(1)
    model: Any = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(4, 6, 6),
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model.eval().to(dtype)


def tokenizer() -> PreTrainedTokenizerFast:
    """One piece per word, with the space before it; the start of the template makes 95 pieces, as the real one's."""
    spoken = [space + word for word in tiny.WORDS for space in ("", " ")]
    pieces = ["<pad>", "<unk>", "<s>", *re.findall(PIECES, DEFAULT_PROMPT_TEMPLATE["template"]), *spoken]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(PIECES), "isolated")
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])])
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", padding_side="right")


def llama(vocabulary: int) -> Any:
    """3 layers of width 16: the pipeline takes the hidden states two layers before the last."""
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    return LlamaModel(config).eval()


def autoencoder() -> AutoencoderKLHunyuanVideo:
    """4 latent channels, 8 x in space and 4 x in time."""
    torch.manual_seed(3)
    widths: Any = (4, 4, 4, 4)
    return AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=widths, layers_per_block=1, norm_num_groups=2
    ).eval()


def pipeline(dtype: torch.dtype = torch.float32) -> Any:
    """9 pixel frames of 32 x 48."""
    words: Any = tokenizer()
    pooled = clip_tokenizer()
    torch.manual_seed(4)
    clip: Any = CLIPTextModel(clip_config(pooled, 8)).eval()
    pipe = HunyuanVideoPipeline(
        text_encoder=llama(len(words)).to(dtype),
        tokenizer=words,
        transformer=transformer(dtype),
        vae=autoencoder(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=clip.to(dtype),
        tokenizer_2=pooled,
    )
    pipe.set_progress_bar_config(disable=True)
    size = {"height": 32, "width": 48, "num_frames": 9, "max_sequence_length": tiny.TEXT}
    with_defaults(pipe, family_of(pipe.transformer).call_defaults(pipe) | size)
    return pipe


def latents(pipe: Any, prompt: Any = tiny.PROMPT, seed: int = 0, steps: int = 3, **call: Any) -> torch.Tensor:
    """The stock call's latents, with true guidance: two forwards a step."""
    empty = "" if isinstance(prompt, str) else [""] * len(prompt)
    guided = {"negative_prompt": empty, "true_cfg_scale": 3.0}
    call = {"num_inference_steps": steps, "output_type": "latent"} | guided | call
    return pipe(prompt=prompt, generator=torch.Generator().manual_seed(seed), **call).frames
