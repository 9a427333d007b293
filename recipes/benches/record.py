"""`mmdit bench record`: what recording costs beside plain generation, on whole forwards of a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from probe.clock import Clock
from probe.models.cogvideox import COGVIDEOX, clip_frames
from probe.models.load import Bare, load
from probe.readout.base import Readout
from probe.readout.column import ColumnMass
from probe.readout.entropy import Entropy
from probe.readout.frame import FrameMass
from probe.readout.mass import RegionMass
from probe.readout.sparsity import Sparsity
from probe.readout.token import TokenMass
from probe.readout.word import WordMaps
from probe.site import Branch
from probe.tracer import Traced
from recipes.benches.attention import WORDS, Shape, prompt_of, shape_of
from recipes.benches.timing import Method

MINIATURE = "miniature"
LAYERS = 4
"""Layers of the random model; its cost per layer is that of a deeper one."""


def methods(size: str, device: str, dtype: torch.dtype) -> tuple[str, list[Method]]:
    """What is run, in words, and its methods, plain first. `size` is "miniature" or a shape of `bench attention`.

    The miniature has its own weights; any other is a CogVideoX of LAYERS random layers.
    """
    model = (
        load(MINIATURE, device=device).transformer if size == MINIATURE else random_model(shape_of(size), device, dtype)
    )
    bench = _Forward(model)
    light = lambda: (WordMaps(*WORDS), RegionMass())  # noqa: E731
    heavy = lambda: (*light(), FrameMass(), TokenMass(), Entropy(), ColumnMass(), Sparsity())  # noqa: E731
    limit = 1.15 if size == MINIATURE else 1.05
    made = [
        Method("forward", "plain", bench.plain, extra=False),
        bench.method("traced, no readout", tuple, None),
        bench.method("light: 6 words and region mass", light, limit),
        bench.method("heavy: every readout", heavy, None),
        bench.method("heavy, fused with the output", heavy, None, fuse=True),
    ]
    return bench.title(size), made


class _Forward:
    """One forward of a CogVideoX transformer, guidance batch of two, on random inputs of the size it was made for."""

    def __init__(self, model: Any) -> None:
        config = model.config
        self.model, self.pipe = model, Bare(model)
        self.prompt = prompt_of(config.max_text_seq_length)
        layout = COGVIDEOX.clip(config, {})
        self.shape = Shape(layout.text, layout.grid, config.num_attention_heads, config.attention_head_dim)
        noise = torch.Generator().manual_seed(0)
        size = (2, clip_frames(config), config.in_channels, config.sample_height, config.sample_width)
        latents = torch.randn(size, generator=noise)
        text = torch.randn(2, config.max_text_seq_length, config.text_embed_dim, generator=noise)
        self.inputs = {
            "hidden_states": latents.to(model.device, model.dtype),
            "encoder_hidden_states": text.to(model.device, model.dtype),
            "timestep": torch.full((2,), 500, device=model.device),
        }

    def title(self, size: str) -> str:
        """What a forward is."""
        return f"{size}: {len(self.model.transformer_blocks)} layers, batch 2, {self.shape}"

    @torch.no_grad()
    def plain(self) -> Tensor:
        """The model's output."""
        return self.model(**self.inputs, return_dict=False)[0]

    def method(
        self, name: str, readouts: Callable[[], Sequence[Readout]], target: float | None, fuse: bool = False
    ) -> Method:
        """The same forward, recorded; its error is the difference to the plain output."""

        def run() -> Tensor:
            return Traced(self.pipe, readouts(), fuse).run(drive, [self.prompt])

        def drive(clock: Clock) -> Tensor:
            clock.tell(0, 1, [Branch(guided=False), Branch()])
            return self.plain()

        def error() -> float:
            plain = self.plain().double()
            return float((run().double() - plain).abs().max() / plain.abs().max())

        return Method("forward", name, run, False, target, error)


def random_model(shape: Shape, device: str, dtype: torch.dtype, layers: int = LAYERS) -> Any:
    """A CogVideoX transformer with random weights whose own clip has the grid of `shape`."""
    from diffusers import CogVideoXTransformer3DModel

    torch.manual_seed(0)
    model: Any = CogVideoXTransformer3DModel(
        num_attention_heads=shape.heads,
        attention_head_dim=shape.width,
        num_layers=layers,
        text_embed_dim=64,
        sample_width=2 * shape.grid.width,
        sample_height=2 * shape.grid.height,
        sample_frames=4 * (shape.grid.frames - 1) + 1,
        max_text_seq_length=shape.text,
        use_rotary_positional_embeddings=False,
    )
    return model.eval().to(device).to(dtype)
