"""Masks from maps: cut, cleaned, compared with each other and with a truth. numpy and scikit-image.

A map is float [F, Y, X] (lift, or any score), a mask bool [F, Y, X], True = inside; F token frames, Y rows, X columns.
Sizes are in patches. Patches touch at their sides; in 3-D also the same patch of neighbouring frames.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from skimage import filters, measure, morphology, transform

from probe.errors import LayoutError, UsageError
from probe.layout import Grid
from probe.measure import set_overlap

Mask = NDArray[np.bool_]
Map = NDArray[np.floating[Any]]
Per = Literal["frame", "clip", "none"]
Method = Literal["otsu", "threshold", "top"]


def threshold(values: ArrayLike, value: float) -> Mask:
    """Inside where the map is > `value`."""
    return np.asarray(values) > value


def otsu(values: ArrayLike) -> Mask:
    """Inside in the upper of the two groups that best part the values of the clip (Otsu 1979, 256 bins); a constant map
    has nothing inside.
    """
    scaled = normalise(values, "clip")
    middle = filters.threshold_otsu(scaled.ravel())  # of three axes, scikit-image would take 4 columns for colours
    return scaled >= middle + 1 / 512  # the end of that bin: all of it belongs to the lower group


def top(values: ArrayLike, share: float) -> Mask:
    """Inside the `share` of patches with the largest values; those equal to the last of them come along.

    Raises:
        UsageError: the share is not in (0, 1].
    """
    values = np.asarray(values)
    if not 0 < share <= 1:
        raise UsageError(f"The share of a mask must lie in 0 to 1, above 0. Got {share}. Take 0.1 for a tenth.")
    count = max(1, round(share * values.size))
    return values >= np.partition(values, -count, axis=None)[-count]


def normalise(values: ArrayLike, per: Per = "clip") -> Map:
    """Minimum to 0 and maximum to 1, in each frame (as DiTCtrl does) or over the clip; "none" leaves the map.

    Where all values are equal, but for float32 rounding, the result is 0.
    """
    values = _three(values).astype(float)
    if per == "none":
        return values
    axes = (1, 2) if per == "frame" else None
    low, high = values.min(axes, keepdims=True), values.max(axes, keepdims=True)
    flat = high - low <= np.finfo(np.float32).eps * np.maximum(np.abs(low), np.abs(high))
    return np.where(flat, 0, (values - low) / np.where(flat, 1, high - low))


def smooth(values: ArrayLike, sigma: float) -> Map:
    """Gaussian blur of each frame, `sigma` in patches, edges repeated; 0 leaves the map.

    Raises:
        UsageError: sigma is negative.
    """
    if not 0 <= sigma < np.inf:
        raise UsageError(f"The blur of a map must be 0 patches or more. Got {sigma}. Take 0 for none.")
    return np.stack([filters.gaussian(frame, sigma, preserve_range=True) for frame in _three(values).astype(float)])


def largest_component(mask: ArrayLike, per: Literal["frame", "clip"] = "clip") -> Mask:
    """Only the largest connected part: one for the clip, through time, or one in each frame. The first of equals."""
    mask = _three(mask).astype(bool)
    return _largest(mask) if per == "clip" else np.stack([_largest(frame) for frame in mask])


def opening(mask: ArrayLike, radius: int) -> Mask:
    """Remove from each frame what a disk of this radius does not fit into (Serra 1982); things go on past the edge."""
    return morphology.opening(_three(mask).astype(bool), _disk(radius))


def closing(mask: ArrayLike, radius: int) -> Mask:
    """Fill in each frame the gaps that a disk of this radius does not fit into (Serra 1982); past the edge is empty."""
    disk, (_, height, width) = _disk(radius), _three(mask).shape
    room = np.pad(np.asarray(mask, bool), ((0, 0), (radius, radius), (radius, radius)))
    return morphology.closing(room, disk)[:, radius : radius + height, radius : radius + width]


def resize(mask: ArrayLike, grid: Grid, method: Literal["nearest", "area"] = "nearest", share: float = 0.5) -> Mask:
    """The mask on another grid; frames stretch like rows and columns.

    nearest: each new patch takes the old one under its centre. area: inside where more than `share` of the new patch
    is covered.

    Raises:
        LayoutError: the mask has not three axes.
    """
    mask = _three(mask).astype(bool)
    if method == "nearest":
        places = [(2 * np.arange(new) + 1) * old // (2 * new) for new, old in zip(grid.shape, mask.shape, strict=True)]
        return mask[np.ix_(*places)]
    return transform.resize_local_mean(mask.astype(float), grid.shape, preserve_range=True) > share


def extract(
    values: ArrayLike,
    method: Method = "otsu",
    value: float | None = None,
    sigma: float = 0.0,
    per: Per = "clip",
    radius: int = 0,
    component: bool = False,
) -> Mask:
    """A mask from a map, in this order: smooth, normalise, cut, open by `radius`, largest component.

    `value` is the threshold (0 to 1 after normalising; a lift with per "none") or the share of `top`; Otsu finds its
    own.

    Raises:
        UsageError: the value is missing, or comes with Otsu.
    """
    if (method == "otsu") != (value is None):
        raise UsageError(
            f"Otsu must find its threshold itself, and threshold and top must have a value. Got {method} with {value}. "
            "Give a threshold, or a share for top."
        )
    scaled = normalise(smooth(values, sigma), per)
    if value is None:
        mask = otsu(scaled)
    elif method == "top":
        mask = top(scaled, value)
    else:
        mask = threshold(scaled, value)
    mask = opening(mask, radius) if radius else mask
    return largest_component(mask) if component else mask


def iou(a: ArrayLike, b: ArrayLike) -> float:
    """Intersection over union of two masks of one grid, 0 to 1; NaN for two empty ones.

    Raises:
        LayoutError: the grids differ; so for everything below that takes two.
    """
    a, b = _alike(a, b)
    return float(set_overlap(a.ravel(), b.ravel()))


def iou_per_frame(a: ArrayLike, b: ArrayLike) -> Map:
    """`iou` of each frame, [F]; NaN where both are empty."""
    a, b = _alike(a, b)
    return set_overlap(_by_frame(a), _by_frame(b))


def temporal_iou(mask: ArrayLike) -> Map:
    """IoU of each frame with the next, [F - 1]: 1 for what stays still, NaN where there is nothing."""
    mask = _three(mask)
    return iou_per_frame(mask[:-1], mask[1:])


def pointing(values: ArrayLike, truth: ArrayLike) -> float:
    """Share of the frames with a truth in which the map's peak lies inside it, 0 to 1; NaN without any truth.

    Source: the pointing game (Zhang et al. 2016, excitation backprop), frame by frame.
    """
    values, truth = _alike(values, truth)
    inside, shown = _by_frame(truth), truth.any((1, 2))
    hit = inside[np.arange(len(inside)), _by_frame(values).argmax(1)]
    return float(hit[shown].mean()) if shown.any() else float("nan")


def best_iou(values: ArrayLike, truth: ArrayLike) -> tuple[float, float]:
    """The largest IoU any threshold reaches, and the largest such threshold: `threshold(values, it)` is that mask. NaN
    without any truth.
    """
    levels, inside, chosen = _curve(values, truth)
    if not inside[-1]:
        return float("nan"), float("nan")
    scores = inside / (chosen + inside[-1] - inside)
    best = int(scores.argmax())
    return float(scores[best]), float(np.nextafter(levels[best], -np.inf))


def average_precision(values: ArrayLike, truth: ArrayLike) -> float:
    """Mean precision over the recall gained at each distinct value, 0 to 1, without interpolation; NaN without any
    truth. Source: information retrieval.
    """
    _, inside, chosen = _curve(values, truth)
    if not inside[-1]:
        return float("nan")
    return float((np.diff(inside, prepend=0) / inside[-1] * inside / chosen).sum())


def _curve(values: ArrayLike, truth: ArrayLike) -> tuple[Map, NDArray[np.intp], NDArray[np.intp]]:
    """For each distinct value, largest first: itself, and the patches at or above it, those inside and all."""
    values, truth = _alike(values, truth)
    order = np.argsort(-values, axis=None, kind="stable")
    ranked, inside = values.ravel()[order], truth.ravel()[order].astype(bool).cumsum()
    last = np.flatnonzero(np.append(np.diff(ranked) != 0, True))
    return ranked[last], inside[last], last + 1


def _largest(mask: Mask) -> Mask:
    labels = np.asarray(measure.label(mask, connectivity=1))
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return (labels == sizes.argmax()) & mask


def _disk(radius: int) -> NDArray[Any]:
    if radius < 0:
        raise UsageError(f"The radius of a disk must be 0 patches or more. Got {radius}. Take 0 for none.")
    return np.asarray(morphology.disk(radius))[None]


def _by_frame(values: NDArray[Any]) -> NDArray[Any]:
    """[F, Y * X]."""
    return values.reshape(len(values), values.shape[1] * values.shape[2])


def _three(values: ArrayLike) -> NDArray[Any]:
    values = np.asarray(values)
    if values.ndim != 3 or not values.size:
        raise LayoutError(
            f"A map or mask must have three axes, frames, rows and columns. Got {values.shape}. Choose one word and "
            "layer."
        )
    return values


def _alike(a: ArrayLike, b: ArrayLike) -> tuple[NDArray[Any], NDArray[Any]]:
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape or a.ndim != 3:
        raise LayoutError(
            f"Two masks must lie on one grid. Got {a.shape} and {b.shape}. Resize one, or choose the same segment."
        )
    return a, b
