"""Random inputs for a self-check."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def noise_like(model: Any) -> Callable[..., Tensor]:
    """`noise(2, 3)`: normal noise [2, 3] in the model's dtype on its device, the same at each call of this function."""
    generator, parameter = torch.Generator().manual_seed(0), next(model.parameters())
    return lambda *shape: torch.randn(shape, generator=generator).to(parameter.device, model.dtype)
