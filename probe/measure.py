"""Numbers derived from what the readouts recorded: lift, frame matrices, entropy, sinks, kinds of heads. numpy only.

Functions work along the last axes and keep the leading ones (layers, heads, steps), written [...]. What is not defined
(an empty region, a single frame, a flat profile) is NaN.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from probe.errors import LayoutError

Floats = NDArray[np.floating[Any]]
Bools = NDArray[np.bool_]


def enrichment(mass: ArrayLike, sizes: ArrayLike, keys: int) -> Floats:
    """Lift of region masses [..., R, C]: mass * keys / size, 0 to keys / size, 1.0 = uniform attention.

    `sizes` [C], or [R, C] where rows differ (text rows have no frame of their own), counts the tokens of each column
    region; `keys` those of the whole softmax. An empty region is NaN. Source: the identity lift = p / p_uniform.

    Raises:
        LayoutError: the sizes do not fit the columns.
    """
    mass, sizes = np.asarray(mass), np.asarray(sizes, float)
    if sizes.ndim > 2 or sizes.shape != mass.shape[-sizes.ndim :]:
        raise LayoutError(
            f"Region sizes must be [C] or [R, C] for masses [..., R, C]. Got {sizes.shape} for {mass.shape}. Count the "
            "tokens of every column."
        )
    return mass * _ratio(keys, sizes)


def video_conditional(frames: ArrayLike) -> Floats:
    """Frame matrix [..., F, F] given that a row looks at the video: the text column is dropped, rows sum to 1.

    A row frame that never looks at the video is NaN. Source: conditional probability.
    """
    square = _square(frames)
    return _ratio(square, square.sum(-1, keepdims=True))


def distance_profile(frames: ArrayLike) -> Floats:
    """t(d) [..., F]: mean of T_fg over |f - g| = d, the mass per pair of frames, 0 to 1.

    `frames` [..., F, F] or [..., F, F + 1], joint or conditional; so for the next five functions. Source: the stripes
    that fade with distance in Wen et al. 2025 (arXiv 2504.10317).
    """
    square = _square(frames)
    both = (square + square.swapaxes(-1, -2)) / 2
    return np.stack([both.diagonal(d, -2, -1).mean(-1) for d in range(square.shape[-1])], -1)


def distance_decay(frames: ArrayLike) -> tuple[Floats, Floats]:
    """(rate, R2) [...] of t(d) = t0 exp(-rate d), by least squares of log t on d >= 1; rate per token frame.

    d = 0 stays out: it holds the attention inside a frame, another mechanism than looking through time. Distances
    without mass stay out too, and each distance weighs the same. NaN with fewer than 3 distances; R2 (0 to 1) is NaN
    for a flat profile. Source: the decay over time in Radial Attention (Li et al. 2025, arXiv 2506.19852).
    """
    profile = distance_profile(frames)[..., 1:].astype(float)
    seen = profile > 0
    count = np.where(seen.sum(-1, keepdims=True) >= 3, seen.sum(-1, keepdims=True), np.nan)
    log = np.log(profile, where=seen, out=np.zeros_like(profile))
    x = np.where(seen, np.arange(1, profile.shape[-1] + 1), 0)
    x, y = (np.where(seen, v - v.sum(-1, keepdims=True) / count, 0) for v in (x, log))
    slope = _ratio((x * y).sum(-1), (x * x).sum(-1))
    total = (y * y).sum(-1)
    left = ((y - slope[..., None] * x) ** 2).sum(-1)
    return -slope, 1 - _ratio(left, np.where(total > 1e-12, total, 0))


def self_frame_mass(frames: ArrayLike) -> Floats:
    """Mean of T_ff [...]: what frames give to themselves, 0 to 1, uniform 1 / F if conditional. Source: definition."""
    return _square(frames).diagonal(0, -2, -1).mean(-1)


def first_frame_mass(frames: ArrayLike) -> Floats:
    """Mean of T_f0 over f > 0 [...]: what later frames give to the first, 0 to 1. NaN for one frame.

    Source: Sparse VideoGen keeps first-frame columns in its Wan masks (Xi et al. 2025, arXiv 2502.01776).
    """
    column = _square(frames)[..., 1:, 0]
    return _ratio(column.sum(-1), column.shape[-1])


def causality(frames: ArrayLike) -> Floats:
    """(past - future) / (past + future) [...], -1 to 1; 0 looks both ways alike, 1 looks back only. NaN for one frame.

    past sums T_fg over g < f, future over g > f. Source: definition, the usual contrast ratio.
    """
    square = _square(frames)
    past, future = np.tril(square, -1).sum((-1, -2)), np.triu(square, 1).sum((-1, -2))
    return _ratio(past - future, past + future)


def text_mass(frames: ArrayLike) -> Floats:
    """Mean of the last column of [..., F, F + 1] over the frames [...]: what the video gives to the text, 0 to 1.

    Raises:
        LayoutError: the matrix has no text column.
    """
    frames = np.asarray(frames)
    if _square(frames).shape == frames.shape:
        raise LayoutError(
            f"A frame matrix must be [..., F, F + 1] to tell its text mass. Got {frames.shape}. Keep the text column."
        )
    return frames[..., -1].mean(-1)


def normalised_entropy(entropy: ArrayLike, keys: int) -> Floats:
    """H / log(keys) of an entropy in nats, any shape: 0 one key, 1 uniform. Source: Shannon efficiency.

    Raises:
        LayoutError: fewer than two keys.
    """
    if keys < 2:
        raise LayoutError(f"A normalised entropy must have at least 2 keys. Got {keys}. Count the keys of the softmax.")
    return np.asarray(entropy, float) / np.log(keys)


def effective_keys(entropy: ArrayLike) -> Floats:
    """exp(H) of an entropy in nats, any shape: 1 to the number of keys. Source: perplexity; Hill number of order 1."""
    return np.exp(np.asarray(entropy, float))


def column_enrichment(columns: ArrayLike) -> Floats:
    """c_j * N of column masses [..., N] (mean over rows of p_ij, sum 1): 0 to N, 1.0 = uniform. Source: definition."""
    columns = np.asarray(columns)
    return columns * columns.shape[-1]


def sink_set(columns: ArrayLike, tau: float = 10.0) -> Bools:
    """The sink columns, bool [..., N]: those with more than `tau` times their uniform share.

    Source: own convention; attention sinks as in Xiao et al. 2024 (StreamingLLM).
    """
    return column_enrichment(columns) > tau


def sink_score(columns: ArrayLike) -> Floats:
    """max_j c_j [...]: mass of the strongest column, 1 / N to 1. Source: definition."""
    return np.asarray(columns).max(-1)


def sink_mass(columns: ArrayLike, tau: float = 10.0) -> Floats:
    """Total mass on the sink set [...], 0 to 1. Source: definition."""
    return np.where(sink_set(columns, tau), columns, 0).sum(-1)


def set_overlap(a: ArrayLike, b: ArrayLike) -> Floats:
    """|a & b| / |a | b| of two sets bool [..., N] (sinks, masks): [...], 0 to 1; NaN for two empty sets.

    Source: Jaccard index.
    """
    a, b = np.asarray(a, bool), np.asarray(b, bool)
    return _ratio((a & b).sum(-1), (a | b).sum(-1))


def head_class(
    spatial: ArrayLike,
    temporal: ArrayLike,
    text: ArrayLike,
    sink: ArrayLike,
    uniform: tuple[float, float],
    *,
    text_above: float = 0.5,
    sink_above: float = 0.5,
    lift_above: float = 1.5,
) -> NDArray[np.str_]:
    """Kind of each head, str [...]: text, sink, spatial, temporal, global; unknown where a mass is NaN.

    Masses of video rows, all [...]: `spatial` on their own frame, `temporal` on their position (+-r) in other frames,
    `text`, `sink`. `uniform` holds the shares of all keys that are in the spatial and the temporal band. The first
    rule that holds: text > `text_above`; sink > `sink_above`; the band of the larger lift (mass / uniform share) if
    that is > `lift_above`; else global. Source: spatial and temporal heads of Sparse VideoGen (Xi et al. 2025), told
    there by the error of the recovered output; text, sink and global are an extension.
    """
    spatial, temporal, text, sink = np.broadcast_arrays(
        *(np.asarray(m, float) for m in (spatial, temporal, text, sink))
    )
    lifts = np.stack([spatial / uniform[0], temporal / uniform[1]])
    band = np.where(lifts[0] >= lifts[1], "spatial", "temporal")
    rules = [np.isnan(lifts.sum(0) + text + sink), text > text_above, sink > sink_above, lifts.max(0) > lift_above]
    return np.select(rules, ["unknown", "text", "sink", band], "global")


def settling_step(similarity: ArrayLike, threshold: float = 0.9) -> NDArray[np.intp]:
    """First place on the last axis from which the similarity to the last map stays > `threshold`: int [...].

    `similarity` [..., steps]; a head that never settles gives the number of steps. Source: definition; attention is
    stable over steps in AdaSpa (arXiv 2502.21079).
    """
    above = np.asarray(similarity) > threshold
    settled = np.logical_and.accumulate(above[..., ::-1], -1)
    return above.shape[-1] - settled.sum(-1)


def _square(frames: ArrayLike) -> Floats:
    """The frame by frame part of a frame matrix."""
    frames = np.asarray(frames)
    count = frames.shape[-2] if frames.ndim > 1 else 0
    if not count or frames.shape[-1] not in (count, count + 1):
        raise LayoutError(
            f"A frame matrix must be [..., F, F], or [..., F, F + 1] with the text last. Got {frames.shape}. Put the "
            "frames that look on the rows."
        )
    return frames[..., :count]


def _ratio(top: ArrayLike, bottom: ArrayLike) -> Floats:
    """Division where nothing by nothing, or anything by nothing, is NaN."""
    top, bottom = np.broadcast_arrays(np.asarray(top, float), np.asarray(bottom, float))
    return np.divide(top, bottom, where=bottom != 0, out=np.full(top.shape, np.nan))
