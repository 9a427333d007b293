"""Two measurements of one kind against each other, and the heads that stand out. numpy only. L layers, H heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from probe.errors import UsageError

Floats = NDArray[np.floating[Any]]
Mode = Literal["absolute", "relative", "zscore"]


def correlation(a: ArrayLike, b: ArrayLike) -> float:
    """Pearson correlation over all values of two arrays of one shape, -1 to 1; NaN where one is constant.

    Raises:
        UsageError: the shapes differ.
    """
    x, y = _like(a, b)
    x, y = x - x.mean(), y - y.mean()
    scale = float(np.sqrt((x * x).sum() * (y * y).sum()))
    return float((x * y).sum() / scale) if scale > 0 else float("nan")


def difference(a: ArrayLike, b: ArrayLike, mode: Mode = "absolute") -> Floats:
    """By how much `a` exceeds `b`, same shape. Equal arrays give 0 and swapping them flips the sign, in every mode.

    absolute: a - b, in their unit. relative: 2 (a - b) / (|a| + |b|), -2 to 2. zscore: a - b, minus its mean over the
    whole array, over its standard deviation there. With one metric [L, H] that is how unusual the change of a head is
    among all heads; a change that all heads share is 0.

    Raises:
        UsageError: the shapes differ.
    """
    a, b = _like(a, b)
    if mode == "relative":
        scale = np.abs(a) + np.abs(b)
        return 2 * (a - b) / np.where(scale == 0, 1, scale)
    return _zscore(a - b) if mode == "zscore" else a - b


@dataclass(frozen=True)
class HeadScore:
    """A head by its place on the axes of [L, H], and its value."""

    layer: int
    head: int
    value: float


def rank_heads(metric: ArrayLike, n: int) -> list[HeadScore]:
    """The `n` heads of largest value in [L, H], largest first, equal ones in order; NaN is left out.

    Raises:
        UsageError: the metric has other axes.
    """
    metric = np.asarray(metric, float)
    if metric.ndim != 2:
        raise UsageError(f"Heads must be ranked by a metric [L, H]. Got {metric.shape}. Choose one step and metric.")
    order = np.argsort(-metric, axis=None, kind="stable")[: max(n, 0)]
    places = np.stack(np.unravel_index(order, metric.shape), -1).tolist()
    return [HeadScore(i, j, float(metric[i, j])) for i, j in places if np.isfinite(metric[i, j])]


@dataclass(frozen=True)
class Candidates:
    """Heads worth an ablation, as many others to compare with, and the composite score [L, H] behind both."""

    heads: list[HeadScore]
    control: list[HeadScore]
    score: Floats


def candidates(
    metrics: Mapping[str, ArrayLike], signs: Mapping[str, float], n: int, seed: int | None = None
) -> Candidates:
    """Heads by several metrics [L, H] together: the mean of sign * z, z over all heads of a metric.

    A sign of 1 seeks large values, -1 small ones. The control group is the `n` lowest scores, lowest first, or with a
    `seed` `n` heads drawn at random from the rest.

    Raises:
        UsageError: metrics and signs differ in name, or there are fewer than 2 n heads with a score.
    """
    if not metrics or set(metrics) != set(signs):
        raise UsageError(
            f"Every metric must have its sign. Got metrics {', '.join(metrics) or 'none'}, signs "
            f"{', '.join(signs) or 'none'}. Name both alike."
        )
    score = np.mean([signs[name] * _zscore(np.asarray(metric, float)) for name, metric in metrics.items()], 0)
    every = rank_heads(score, score.size)
    if not 0 < 2 * n <= len(every):
        raise UsageError(
            f"Candidates and their control group must be 1 to {len(every) // 2} heads each. Got {n}. Choose another n."
        )
    rest = every[n:]
    if seed is None:
        return Candidates(every[:n], rest[: -n - 1 : -1], score)
    drawn = np.random.default_rng(seed).permutation(len(rest))[:n]
    return Candidates(every[:n], [rest[i] for i in drawn], score)


def _like(a: ArrayLike, b: ArrayLike) -> tuple[Floats, Floats]:
    """Both as float64, of one shape."""
    a, b = np.asarray(a, float), np.asarray(b, float)
    if a.shape != b.shape:
        raise UsageError(f"Two arrays to compare must have one shape. Got {a.shape} and {b.shape}. Choose a like pair.")
    return a, b


def _zscore(values: Floats) -> Floats:
    """Deviation from the mean in population standard deviations, NaN left out; 0 where all are equal."""
    known = values[np.isfinite(values)]
    spread = known.std() if known.size else 0.0
    return (values - known.mean()) / spread if spread > 1e-12 else 0 * values
