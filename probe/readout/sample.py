"""Sampled rows: for what needs whole rows of the attention matrix, such as their largest values.

Rows are drawn in strata of equal size (the frames), without replacement, by a seeded generator of their own. The same
rows at every call: differences between layers, steps and heads are then not blurred by the draw.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from probe import attend
from probe.entry import Entry
from probe.layout import TokenLayout

OfHead = Callable[[int, Tensor], Tensor]

CHUNK = 4 * 2**20
"""Weights held at once, 16 MB in float32; what is made of them (sorted, cumulated) may hold four times as much."""

_Z = 1.959963984540054  # normal quantile of 0.975


def draw(strata: int, population: int, count: int, seed: int) -> NDArray[np.intp]:
    """Positions [strata, min(count, population)] in 0 to population - 1, ascending and each once in a stratum."""
    random = np.random.default_rng(seed)
    picked = [random.permutation(population)[:count] for _ in range(strata)]
    return np.sort(np.stack(picked), -1).astype(np.intp)


def video_rows(layout: TokenLayout, count: int, seed: int) -> NDArray[np.intp]:
    """Positions [F, min(count, patches)] in the sequence of `count` video tokens of every frame."""
    starts = [frame.start for frame in layout.frame_slices()]
    return draw(layout.frames, layout.grid.patches, count, seed) + np.array(starts)[:, None]


def map_rows(entry: Entry, rows: Tensor, of: Callable[[Tensor], OfHead]) -> Tensor:
    """Values [H, R, Q] of single rows: `of(rows [r])(head, p [r, M])` gives [r, Q] from exact weights p of one head.

    At most CHUNK weights at a time, so that memory does not grow with rows, heads or keys.
    """
    made = []
    for part in rows.split(max(CHUNK // entry.keys, 1)):
        of_head, heads = of(part), enumerate(zip(entry.q, entry.k, entry.lse, strict=True))
        weights = ((h, attend.probabilities(q[part], k, lse[part], entry.scale)) for h, (q, k, lse) in heads)
        made.append(torch.stack([of_head(head, p) for head, p in weights]))
    return torch.cat(made, 1)


def stratified(values: Tensor, population: int) -> tuple[Tensor, Tensor]:
    """Mean over strata of `population` rows each, and the half-width of its 95 % interval: both [..., Q].

    `values` [..., strata, m, Q] are m rows of each stratum, drawn without replacement. The half-width is t times the
    standard error sqrt(sum_s s_s^2 / m (1 - m / population)) / strata, with Student's t for the degrees of freedom of
    Satterthwaite; 0 when all rows are there, NaN for a single row of several. Below about 32 rows of a skewed quantity
    the interval covers less than it says. Source: Cochran 1977, Sampling Techniques, sections 5.3 and 5.4.
    """
    strata, m = values.shape[-3:-1]
    mean = values.mean((-3, -2))
    if m >= population:
        return mean, mean * 0  # NaN over no rows at all
    parts = values.var(-2) / m * (1 - m / population) if m > 1 else torch.full_like(values[..., 0, :], math.nan)
    total = parts.sum(-2)
    freedom = (m - 1) / (parts / total.unsqueeze(-2)).square().sum(-2)
    half = _student(freedom) * total.sqrt() / strata
    return mean, torch.where(total == 0, 0, half)


def _student(freedom: Tensor) -> Tensor:
    """Two-sided 95 % quantile of Student's t by its expansion at the normal one (Abramowitz and Stegun 26.7.5); 0.7 %
    low at 3 degrees of freedom, 2e-4 at 8.
    """
    z, n = _Z, freedom
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / n + second / n**2 + third / n**3
