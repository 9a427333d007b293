"""What an edit did to clips of the miniature's world, as numbers. No torch, no learned judge: pixels and the rules of
`recipes.scene`.

Shapes: clip uint8 [F, H, W, 3]; token mask bool [T, h, w].
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from skimage.morphology import dilation

from probe.errors import UsageError
from probe.mask import iou
from recipes import scene

Clip = NDArray[np.uint8]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Made:
    """What a recipe made: the clip of each prompt, the texts it was made from, the masks it found, numbers it told."""

    clips: Mapping[str, Clip]
    texts: Mapping[str, str]
    masks: Mapping[str, Mask] = field(default_factory=dict)
    numbers: Mapping[str, float] = field(default_factory=dict)


def psnr(made: Made, of: str, to: str) -> float:
    """Peak signal to noise ratio of two clips in dB, 50 at most."""
    return _psnr(made.clips[of], made.clips[to])


def background_psnr(made: Made, of: str, to: str) -> float:
    """The same outside of both clips' objects (with a margin of 2 pixels), in dB, 50 at most."""
    a, b = made.clips[of], made.clips[to]
    objects = scene.foreground(a)[0] | scene.foreground(b)[0]
    outside = ~np.stack([dilation(frame, np.ones((5, 5), bool)) for frame in objects])
    return _psnr(a[outside], b[outside]) if outside.any() else float("nan")


def ssim(made: Made, of: str, to: str) -> float:
    """Structural similarity of two clips, mean over frames, at most 1."""
    pairs = zip(made.clips[of], made.clips[to], strict=True)
    return float(np.mean([structural_similarity(a, b, channel_axis=-1) for a, b in pairs]))


def object_iou(made: Made, of: str, to: str, color: str | None = None) -> float:
    """Intersection over union of the objects of two clips (those of one color), 0 to 1."""
    a, b = (
        scene.foreground(made.clips[name])[0] if color is None else scene.object_mask(made.clips[name], color)
        for name in (of, to)
    )
    return float(iou(a, b))


def agreement(made: Made, of: str, text: str | None = None) -> float:
    """The share of (color, shape, direction, background) that the rules read from a clip of one object as its text, or
    another `text`, says.
    """
    ((color, shape, direction),), background = _one_object(text or made.texts[of])
    seen = scene.classify(made.clips[of])
    if seen is None:
        return 0.0
    said = (color, shape, direction, background)
    return float(
        np.mean([a == b for a, b in zip((seen.color, seen.shape, seen.direction, seen.background), said, strict=True)])
    )


def color_share(made: Made, of: str, color: str) -> float:
    """The share of a clip's object pixels whose color is nearest to `color`, 0 to 1; 0 without an object."""
    clip = made.clips[of]
    inside = scene.foreground(clip)[0]
    shades = np.array([*scene.COLORS.values()], float)
    nearest = np.linalg.norm(clip[inside].astype(float)[:, None] - shades, axis=-1).argmin(-1)
    return float((nearest == list(scene.COLORS).index(color)).mean()) if len(nearest) else 0.0


def color_error(made: Made, of: str, color: str) -> float:
    """Distance of the median object color to `color`, in grey levels; 442 (the largest) without an object."""
    clip = made.clips[of]
    inside = scene.foreground(clip)[0]
    if not inside.any():
        return 442.0
    return float(np.linalg.norm(np.median(clip[inside].astype(float), 0) - scene.COLORS[color]))


def shape_fit(made: Made, of: str, text: str | None = None) -> float:
    """Overlap of the objects that a clip's text, or another `text`, names with their shapes drawn to the same box: IoU,
    mean over objects and frames, 0 where an object of that color is not seen.
    """
    objects, _ = scene.parse(text or made.texts[of])
    bodies = [(scene.object_mask(made.clips[of], color), shape) for color, shape, _ in objects]
    return float(np.mean([scene.overlap(frame, shape) for body, shape in bodies for frame in body]))


def object_share(made: Made, of: str, color: str | None = None) -> float:
    """The share of a clip's pixels that show an object, or the largest part of a frame in its color."""
    clip = made.clips[of]
    return float((scene.foreground(clip)[0] if color is None else scene.object_mask(clip, color)).mean())


def inside_box(made: Made, of: str, color: str, box: tuple[float, float, float, float]) -> float:
    """The share of an object's pixels, found by color, inside (top, left, bottom, right), given as shares of the
    picture; 0 if there is none.
    """
    body = scene.object_mask(made.clips[of], color)
    height, width = body.shape[1:]
    top, left, bottom, right = (round(b * n) for b, n in zip(box, (height, width, height, width), strict=True))
    return float(body[:, top:bottom, left:right].sum() / body.sum()) if body.any() else 0.0


def inside_frames(made: Made, of: str, color: str, span: tuple[float, float]) -> float:
    """The share of an object's pixels, found by color, in the frames [start, stop), given as shares of the clip; 0 if
    there is none.
    """
    body = scene.object_mask(made.clips[of], color)
    start, stop = (round(share * len(body)) for share in span)
    return float(body[start:stop].sum() / body.sum()) if body.any() else 0.0


def presence(made: Made, of: str, color: str) -> float:
    """The share of frames in which an object of that color is seen."""
    return float(scene.object_mask(made.clips[of], color).any((1, 2)).mean())


def largest_jump(made: Made, of: str) -> float:
    """Largest mean step between neighbouring frames, in grey levels."""
    clip = made.clips[of].astype(float)
    return float(np.abs(np.diff(clip, axis=0)).mean((1, 2, 3)).max())


def mask_iou(made: Made, mask: str, of: str, color: str | None = None) -> float:
    """IoU of a mask that the recipe found with the object of a clip (the one of a color), on the token grid."""
    clip, found = made.clips[of], made.masks[mask]
    body = scene.foreground(clip)[0] if color is None else scene.object_mask(clip, color)
    return float(iou(found, scene.token_mask(body, found.shape) > 0.5))


def number(made: Made, name: str) -> float:
    """A number the recipe's own readouts told."""
    return float(made.numbers[name])


MEASURES: dict[str, Callable[..., float]] = {
    function.__name__: function
    for function in (
        psnr,
        background_psnr,
        ssim,
        object_iou,
        agreement,
        color_share,
        color_error,
        shape_fit,
        object_share,
        inside_box,
        inside_frames,
        presence,
        largest_jump,
        mask_iou,
        number,
    )
}


def measured(made: Made, name: str, arguments: Mapping[str, Any]) -> float:
    """One measure by name.

    Raises:
        UsageError: no such measure, or other arguments than it takes.
    """
    refuse_unknown(name, arguments)
    try:
        return MEASURES[name](made, **arguments)
    except KeyError as error:
        raise UsageError(
            f"The measure {name} must get its own arguments. Got {dict(arguments)}: {error}. See recipes/effect.py."
        ) from error


def refuse_unknown(name: str, arguments: Mapping[str, Any]) -> None:
    """Nothing, for a measure with its own arguments.

    Raises:
        UsageError: no such measure, or other arguments than it takes.
    """
    if name not in MEASURES:
        raise UsageError(f"A measure must be one of {', '.join(MEASURES)}. Got {name!r}. Choose among those.")
    try:
        inspect.signature(MEASURES[name]).bind(None, **arguments)
    except TypeError as error:
        raise UsageError(
            f"The measure {name} must get its own arguments. Got {dict(arguments)}: {error}. See recipes/effect.py."
        ) from error


def _psnr(a: Clip, b: Clip) -> float:
    if np.array_equal(a, b):
        return 50.0
    return min(50.0, float(peak_signal_noise_ratio(a, b, data_range=255)))


def _one_object(text: str) -> tuple[list[tuple[str, str, str]], str]:
    objects, background = scene.parse(text)
    if len(objects) != 1:
        raise UsageError(f"The measure agreement must have a text with one object. Got {text!r}. Use inside_box.")
    return objects, background
