"""How good a video of several prompts is, from features of its frames: steady, as asked for, turning where it should.

Shapes: features float [F, D] of F frames, of any length but zero; texts float [P, D] of P prompts. A place in the video
is a real number: frame f covers [f, f + 1), so a cut between frames 24 and 25 lies at 25.0. A span is (start, stop).
No torch, no learned model of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import isotonic_regression

from probe.errors import UsageError

Floats = NDArray[np.floating[Any]]
Span = tuple[float, float]


def cscv(features: ArrayLike, penalty: float = 10.0) -> float:
    """Clip Similarity Coefficient of Variation: 1 / (1 + penalty std(s) / mean(s)), s_i = cos(f_i, f_{i+1}), 0 to 1.

    1 where all neighbours are equally alike: also for a video that stands still, so read `ditctrl.motion` beside it.
    One cut in 50 frames between orthogonal features gives 0.41. It depends on the number of frames: compare equal
    lengths.

    Source: DiTCtrl (arXiv 2412.18597) and its metrics/cscv_metric.py at 5fe30bd, population deviation, penalty 10;
    features there are CLIP ViT-B/32's, pooled, before the projection. Departures: the mean over videos is left to the
    caller (the script divides by their number + 1e-5), and where the mean of s is not above 0 the value is 0, its
    limit.

    Raises:
        UsageError: fewer than two frames, or features that are zero or not finite.
    """
    near = _unit(features, 2)
    alike = (near[:-1] * near[1:]).sum(1)
    mean = alike.mean()
    return float(1 / (1 + penalty * alike.std() / mean)) if mean > 0 else 0.0


def consistency(features: ArrayLike) -> float:
    """Mean over the frames from the second on of (cos(f_1, f_t) + cos(f_{t-1}, f_t)) / 2, -1 to 1; 1 where nothing
    changes.

    Source: subject and background consistency of VBench (arXiv 2311.17982), there of whole frames. Here it is meant for
    features of `cut_out` frames, so that an object is compared with itself whatever lies behind it.

    Raises:
        UsageError: as `cscv`.
    """
    unit = _unit(features, 2)
    return float(((unit[1:] @ unit[0]) + (unit[1:] * unit[:-1]).sum(1)).mean() / 2)


def cut_out(frames: NDArray[np.uint8], inside: ArrayLike, grey: int | None = None) -> NDArray[np.uint8]:
    """Frames [F, H, W, 3] with all that is not `inside`, bool [F, H, W], painted in one color: a level of grey, or the
    mean color of the inside of that frame. A neutral grey suits an object, its own mean a background.

    Raises:
        UsageError: a frame has nothing inside.
    """
    inside = np.asarray(inside, bool)
    counts = inside.sum((1, 2))
    if not counts.all():
        raise UsageError("A mask must have something inside in every frame. Got an empty one. Leave that frame out.")
    mean = (frames * inside[..., None]).sum((1, 2)) / counts[:, None]
    fill = mean.round() if grey is None else np.full_like(mean, grey)
    return np.where(inside[..., None], frames, fill[:, None, None]).astype(np.uint8)


def shares(spans: Sequence[Span], frames: int) -> Floats:
    """How much of each frame belongs to each prompt, [F, P], rows sum to 1.

    A frame belongs to the prompt in whose span its middle lies. A gap between two spans is a transition: there the next
    prompt's share rises linearly from 0 to 1. Spans that touch have no transition, the prompt changes at once.

    Raises:
        UsageError: no span, an empty one, or one that begins before the one before it ends.
    """
    edges = [edge for span in spans for edge in span]
    if not spans or any(stop <= start for start, stop in spans) or any(a > b for a, b in pairwise(edges)):
        raise UsageError(
            f"Spans must follow each other, each of them longer than nothing. Got {list(spans)}. Give (start, stop) in "
            "frames, one per prompt."
        )
    middles = np.arange(frames) + 0.5
    ahead: list[Floats] = [np.ones(frames)]
    for (_, stop), (start, _) in pairwise(spans):
        ahead.append(np.clip((middles - stop) / (start - stop), 0, 1) if start > stop else (middles >= start) * 1.0)
    return -np.diff(np.stack([*ahead, np.zeros(frames)], 1), axis=1)


def text_similarity(images: ArrayLike, texts: ArrayLike, share: ArrayLike) -> Floats:
    """Cosine of each frame and the prompt shown there, [F], -1 to 1: sum over prompts of `share` [F, P] times cosine.

    In a transition that is the mean of both prompts' cosines by their shares. Images and texts are embeddings in the
    common space of a CLIP. Source: the text-image similarity that DiTCtrl reports, whose pairing of frames and prompts
    is not published; it is this number times 100, as far as can be told.

    Raises:
        UsageError: features that are zero or not finite.
    """
    return (_cosines(images, texts) * np.asarray(share)).sum(1)


def text_margin(images: ArrayLike, texts: ArrayLike, share: ArrayLike) -> Floats:
    """By how much each frame's own prompt (largest share) is nearer to it than the nearest other one, [F], -2 to 2;
    below 0 where the video shows another prompt. NaN with one prompt. Ours.

    Raises:
        UsageError: as `text_similarity`.
    """
    cosines = _cosines(images, texts)
    if cosines.shape[1] < 2:
        return np.full(len(cosines), np.nan)
    own = np.asarray(share).argmax(1)[:, None] == np.arange(cosines.shape[1])
    return cosines[own] - np.where(own, -np.inf, cosines).max(1)


@dataclass(frozen=True)
class Turn:
    """Where a video turns from one prompt to the next.

    frame: where it is half-way. width: frames from a tenth to nine tenths of the way; 0.8 for a cut. sharpness: the
    largest part of the way made from one frame to the next, 0 to 1; 1 for a cut. contrast: 1 - cosine of the two
    prompts' mean features, 0 to 2; near 0 the video did not turn, and the other numbers mean little.
    """

    frame: float
    width: float
    sharpness: float
    contrast: float


def turn(features: ArrayLike, one: Span, other: Span) -> Turn:
    """Where the features turn between two neighbouring spans. Ours.

    The mean features of the middle half of each span are A and B. The way of a frame is the place of its feature's
    projection on the line from A (0) to B (1), made monotone by isotonic regression (least squares), so that noise
    neither moves nor widens the turn. Ten to ninety percent is the usual rise time of a step response. Where A = B all
    but the contrast, 0, is NaN.

    Raises:
        UsageError: features that are zero or not finite, or a span without a frame in its middle half.
    """
    unit = _unit(features, 2)
    middles = np.arange(len(unit)) + 0.5
    (first, _), (_, last) = halves = [_middle_half(span) for span in (one, other)]
    inside = [(middles >= start) & (middles <= stop) for start, stop in halves]
    if not all(some.any() for some in inside):
        raise UsageError(
            f"A span must have a frame in its middle half. Got {one} and {other} of {len(unit)} frames. Show each "
            "prompt for longer."
        )
    a, b = (unit[some].mean(0) for some in inside)
    contrast = 1 - float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
    length = float((b - a) @ (b - a))
    if length < 1e-12:
        return Turn(np.nan, np.nan, np.nan, 0.0)
    between = (middles >= first) & (middles <= last)
    way = np.clip(isotonic_regression((unit[between] - a) @ (b - a) / length).x, 0, 1)
    low, half, high = (_crossing(middles[between], way, level) for level in (0.1, 0.5, 0.9))
    return Turn(half, high - low, float(np.diff(way).max()), contrast)


def _middle_half(span: Span) -> Span:
    quarter = (span[1] - span[0]) / 4
    return span[0] + quarter, span[1] - quarter


def _crossing(places: Floats, way: Floats, level: float) -> float:
    """Where a rising way first reaches a level, between frames by a line."""
    after = int(np.argmax(way >= level))
    if after == 0:
        return float(places[0])
    return float(np.interp(level, way[after - 1 : after + 1], places[after - 1 : after + 1]))


def _cosines(images: ArrayLike, texts: ArrayLike) -> Floats:
    return _unit(images) @ _unit(texts).T


def _unit(features: ArrayLike, least: int = 1) -> Floats:
    features = np.asarray(features, float)
    if features.ndim != 2 or len(features) < least:
        raise UsageError(
            f"Features must be frames x numbers, of {least} frames or more. Got {features.shape}. Give the features of "
            "every frame of the video."
        )
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    if not (np.isfinite(lengths).all() and (lengths > 0).all()):
        raise UsageError(
            "Features must be finite and not zero. Got some that are not. Look at the frames, and at the weights of "
            "the model that made them."
        )
    return features / lengths
