"""Latent blending: overlapping predictions averaged with a symmetric triangle over each whole segment."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ditctrl.segment import Segments


def triangle(length: int) -> Tensor:
    """w_j = min(2 (j + 0.5) / T, 2 - 2 (j + 0.5) / T), float64 [T] (SA:723-725; the paper's symmetric weight)."""
    rising = (torch.arange(length, dtype=torch.float64) + 0.5) * 2 / length
    return torch.minimum(rising, 2 - rising)


def blend(segments: Segments, parts: Sequence[tuple[int, float, Tensor]]) -> Tensor:
    """The long prediction [1, L, C, H, W] from (segment, weight, prediction [T, C, H, W]) triples.

    Each frame is the weighted mean of what covers it, with weight times `triangle`. `weight` carries the pair loop's
    multiplicity. Blending the model's v equals blending x0, as the authors do (SA:758-767), because all segments
    share the noisy latent; the paper writes it on z_t.
    """
    first = parts[0][2]
    total = first.new_zeros((segments.frames, *first.shape[1:]))
    weights = torch.zeros(segments.frames, dtype=torch.float64)
    window = triangle(segments.length)
    for segment, weight, prediction in parts:
        place = segments.window(segment)
        w = weight * window
        total[place] += prediction * w.to(prediction).view(-1, 1, 1, 1)
        weights[place] += w
    return (total / weights.to(total).view(-1, 1, 1, 1)).unsqueeze(0)
