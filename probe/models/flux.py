"""FLUX.1: pictures; text tokens first, no mask: padding is attended. Double-stream blocks are layers 0 to 18,
single-stream blocks 19 to 56.

The text is T5 alone; CLIP only gives one pooled vector. Guidance is a number the model was distilled with, so that a
batch holds the prompts alone; true guidance (`true_cfg_scale` and a negative prompt) is a second forward of each step.

Latents come packed: [B, N, C] with 2 x 2 latent pixels per token, row after row. Only the position ids tell rows from
columns, so the grid is read from them, and ids that are not the full grid of one picture are refused. A self-check
cannot move a row of patches by itself here: it checks where text and image are, and that the ids are a grid. Nothing
reads what the text rows of the last block give.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from probe.errors import LayoutError
from probe.layout import Grid, TokenLayout
from probe.models.family import Attention, Family, Text
from probe.models.noise import noise_like
from probe.models.rope import Rope, by_axis


def grid_of(ids: Tensor) -> Grid:
    """The grid of position ids [N, 3] or [B, N, 3] as the pipeline makes them: 0, row and column of each token, row
    after row. One device sync.

    Raises:
        LayoutError: other ids, as those of a reference picture behind the first (Kontext).
    """
    one = (ids[0] if ids.dim() == 3 else ids).cpu()
    width = max(1, int((one[:, 1] == 0).sum()))
    height = max(1, len(one) // width)
    if not torch.equal(one, _ids(height, width).to(one.dtype)):
        raise LayoutError(
            f"The image tokens must be one picture, row after row. Got {len(one)} tokens whose position ids are not. "
            "Leave out reference pictures and ids of your own."
        )
    return Grid(1, height, width)


def _ids(height: int, width: int) -> Tensor:
    """[N, 3]."""
    return torch.cartesian_prod(torch.arange(1), torch.arange(height), torch.arange(width))


def _layout(model: Any, inputs: dict[str, Any]) -> TokenLayout:
    """From the forward's own tensors: text [B, T, E] and the position ids of the image."""
    return TokenLayout("text-video", inputs["encoder_hidden_states"].shape[1], grid_of(inputs["img_ids"]))


def _clip(_: Mapping[str, Any], call: Mapping[str, Any]) -> TokenLayout:
    """A picture of the call's size, 1024 x 1024 by default: 16 x 16 pixels per token."""
    height, width = (call.get(side) or 1024 for side in ("height", "width"))
    return TokenLayout("text-video", call["max_sequence_length"], Grid(1, height // 16, width // 16))


def _probe_inputs(model: Any) -> dict[str, Any]:
    """4 x 6 patches and 20 text tokens, so that a check is quick at any model size."""
    config, noise = model.config, noise_like(model)
    inputs: dict[str, Any] = {
        "hidden_states": noise(1, 24, config.in_channels),
        "encoder_hidden_states": noise(1, 20, config.joint_attention_dim),
        "pooled_projections": noise(1, config.pooled_projection_dim),
        "timestep": torch.tensor([0.5], device=model.device),
        "img_ids": _ids(4, 6).to(model.device, model.dtype),
        "txt_ids": torch.zeros(20, 3, device=model.device, dtype=model.dtype),
    }
    if config.guidance_embeds:
        inputs["guidance"] = torch.tensor([3.5], device=model.device)
    return inputs


def _rope(model: Any, inputs: dict[str, Any]) -> Rope:
    """One unit per token, from 0; the text stands at 0 too."""
    device = inputs["hidden_states"].device
    frequencies = by_axis(tuple(model.pos_embed.axes_dim), model.pos_embed.theta, device)
    return Rope(frequencies, frequencies.new_zeros(3))


FLUX = Family(
    name="FLUX",
    transformer="FluxTransformer2DModel",
    pipelines=("FluxPipeline",),
    attentions=(
        Attention("transformer_blocks", "attn", "double"),
        Attention("single_transformer_blocks", "attn", "single"),
    ),
    layout=_layout,
    several="num_images_per_prompt",
    clip=_clip,
    frame_axis=None,
    text=(Text("tokenizer_2", prompts=("prompt_2",)),),
    probe_inputs=_probe_inputs,
    rope=_rope,
    streams=("encoder_hidden_states", "hidden_states"),
    feed_forwards={"transformer_blocks": ("ff", "ff_context"), "single_transformer_blocks": ("proj_out",)},
)
