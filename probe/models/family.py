"""What the probe needs to know of a model family, as data."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from probe.layout import TokenLayout
from probe.site import Branch


@dataclass(frozen=True)
class Family:
    """One model family.

    `transformer` is the diffusers class name, `blocks` and `attention` where its joint-attention modules are. The
    functions read the layout of the joint sequence, the text length, and the branches of a stock pipeline call;
    `probe_inputs` makes small random inputs for a self-check.
    """

    name: str
    transformer: str
    pipelines: tuple[str, ...]
    blocks: str
    attention: str
    layout: Callable[[nn.Module, dict[str, Any]], TokenLayout]
    text_length: Callable[[nn.Module], int]
    branches: Callable[[int, int | None, Any], tuple[Branch, ...]]
    call_defaults: Callable[[Any], dict[str, Any]]
    probe_inputs: Callable[[Any], dict[str, Any]]

    def attention_modules(self, model: nn.Module) -> list[nn.Module]:
        """The joint-attention modules in model order; index = layer."""
        return [getattr(block, self.attention) for block in getattr(model, self.blocks)]

    def inputs(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a model forward by name."""
        names = list(inspect.signature(type(model).forward).parameters)[1:]
        return dict(zip(names, args, strict=False)) | kwargs
