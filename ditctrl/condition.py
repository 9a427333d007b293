"""The text condition of every segment."""

from __future__ import annotations

import torch
from torch import Tensor

from ditctrl.segment import Segments


def conditions(segments: Segments, embeddings: Tensor) -> Tensor:
    """[S, T, E] from one embedding per prompt [n, T, E]: transition j shows (1 - a) E_i + a E_(i+1), a = j / (b + 1),
    padding included (SV:255-307).
    """
    made = []
    for segment in range(segments.count):
        prompt, mix = segments.condition(segment)
        own = embeddings[prompt]
        made.append(own if mix == 0 else (1 - mix) * own + mix * embeddings[prompt + 1])
    return torch.stack(made)
