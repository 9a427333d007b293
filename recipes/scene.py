"""A world of moving shapes that can be drawn, described, and read back from pixels.

Numpy draws it and scikit-image labels it. The miniature in ``data/miniature`` is trained on its clips,
and the rules at the end of this module say what a clip shows without any learned model.

Shapes: clip uint8 [F, H, W, 3]; object mask bool [F, H, W]; token mask float [T, h, w], where latent
frame 0 holds pixel frame 0 and latent frame k holds pixel frames 4k-3 to 4k.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray
from skimage.measure import label

Clip = NDArray[np.uint8]
Mask = NDArray[np.bool_]
Array = NDArray[np.float64]

COLORS = {
    "red": (232, 48, 44),
    "green": (44, 200, 80),
    "blue": (52, 96, 245),
    "yellow": (248, 220, 52),
    "purple": (180, 64, 220),
}
BACKGROUNDS = {
    "black": (10, 10, 14),
    "white": (240, 240, 240),
    "gray": (120, 120, 120),
    "blue": (24, 34, 110),
    "green": (16, 80, 40),
}
DIRECTIONS = {"right": (1, 0), "left": (-1, 0), "up": (0, -1), "down": (0, 1)}
SHAPES = ("circle", "square", "triangle")
SYNONYMS = {"circle": "ball", "square": "box"}

SINGLE_RADIUS, PAIR_RADIUS, TRAVEL = (11.5, 12.5), (9.0, 10.0), (12.0, 32.0)
MIN_CONTRAST = 45.0  # colour distance from the background below which a pixel is never an object
MIN_AREA = 20  # pixels of one frame below which there is no object
MIN_MOVE = 1.5  # pixels over the whole clip below which nothing moves


@dataclass(frozen=True)
class Thing:
    """One object: it travels in a straight line from ``start`` to ``end`` (x, y of its centre, in pixels)."""

    color: str
    shape: str
    direction: str
    radius: float
    start: tuple[float, float]
    end: tuple[float, float]


@dataclass(frozen=True)
class Scene:
    """Things in drawing order on a plain background."""

    things: tuple[Thing, ...]
    background: str = "black"
    frames: int = 17
    size: int = 64


@dataclass(frozen=True)
class Verdict:
    """What the rules read from a clip. ``direction`` is None where nothing moves; ``move`` is (dx, dy) in pixels."""

    color: str
    shape: str
    direction: str | None
    background: str
    move: tuple[float, float]


# --- words -----------------------------------------------------------------------------------------------


def caption(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """Describe a scene. With ``rng``: now and then a synonym, "over" for "on", or the default background named."""
    chance = rng.random if rng is not None else lambda: 1.0
    phrases = []
    for thing in scene.things:
        noun = SYNONYMS.get(thing.shape, thing.shape) if chance() < 0.15 else thing.shape
        phrases.append(f"a {thing.color} {noun} moving {thing.direction}")
    text = " and ".join(phrases)
    if scene.background == "black" and chance() >= 1 / 6:
        return text
    return f"{text} {'over' if chance() < 0.2 else 'on'} a {scene.background} background"


def parse(text: str) -> tuple[list[tuple[str, str, str]], str]:
    """Read a caption back: the (color, shape, direction) of each object, and the background."""
    plain = {synonym: shape for shape, synonym in SYNONYMS.items()}
    words = text.split()
    background = words[-2] if words[-1:] == ["background"] else "black"
    objects = []
    for place, word in enumerate(words):
        if word == "moving":
            color, noun, direction = words[place - 2], words[place - 1], words[place + 1]
            objects.append((color, plain.get(noun, noun), direction))
    if not objects:
        raise ValueError(f"caption must say '<color> <shape> moving <direction>'. Got {text!r}.")
    return objects, background


def all_prompts() -> list[str]:
    """The 60 prompts of one object: every color x shape x direction."""
    return [f"a {c} {s} moving {d}" for c, s, d in product(COLORS, SHAPES, DIRECTIONS)]


# --- drawing ---------------------------------------------------------------------------------------------


def sample(rng: np.random.Generator, pair: float = 0.4, size: int = 64, frames: int = 17) -> Scene:
    """A random scene: two objects with probability ``pair``, a background other than black in two of five."""
    background = str(rng.choice(list(BACKGROUNDS))) if rng.random() < 0.5 else "black"
    if rng.random() >= pair:
        return Scene((_thing(rng, SINGLE_RADIUS, size),), background, frames, size)
    while True:
        first, second = (_thing(rng, PAIR_RADIUS, size) for _ in range(2))
        if second.color != first.color and _apart(first, second):
            return Scene((first, second), background, frames, size)


def render(scene: Scene) -> Clip:
    """Draw a scene, edges smoothed: uint8 [F, H, W, 3]."""
    shape = (scene.frames, scene.size, scene.size, 3)
    clip = np.broadcast_to(np.array(BACKGROUNDS[scene.background], float), shape).copy()
    for thing, cover in zip(scene.things, _covers(scene), strict=True):
        clip += cover[..., None] * (np.array(COLORS[thing.color], float) - clip)
    return np.rint(clip).astype(np.uint8)


def masks(scene: Scene) -> Mask:
    """The visible pixels of each thing: bool [things, F, H, W]."""
    inside = np.stack([cover > 0.5 for cover in _covers(scene)])
    for place in range(len(inside) - 1):
        inside[place] &= ~inside[place + 1 :].any(0)
    return inside


def token_mask(mask: NDArray, grid: tuple[int, int, int] = (5, 8, 8)) -> Array:
    """The share of each token's pixels that a mask [F, H, W] covers: float [T, h, w]."""
    latents, rows, columns = grid
    frames, height, width = mask.shape
    if frames != 4 * (latents - 1) + 1 or height % rows or width % columns:
        raise ValueError(f"mask must have 4(T-1)+1 frames and divide into {grid}. Got {mask.shape}.")
    area = mask.reshape(frames, rows, height // rows, columns, width // columns).mean((2, 4), dtype=float)
    return np.concatenate([area[:1], area[1:].reshape(latents - 1, 4, rows, columns).mean(1)])


def _thing(rng: np.random.Generator, radii: tuple[float, float], size: int) -> Thing:
    radius, direction = rng.uniform(*radii), str(rng.choice(list(DIRECTIONS)))
    low, high = 1.1 * radius, size - 1.1 * radius
    travel = min(rng.uniform(*TRAVEL), high - low)
    first, fixed = rng.uniform(low, high - travel), rng.uniform(low, high)
    dx, dy = DIRECTIONS[direction]
    near, far = (first, first + travel) if dx + dy > 0 else (first + travel, first)
    start, end = ((near, fixed), (far, fixed)) if dx else ((fixed, near), (fixed, far))
    return Thing(str(rng.choice(list(COLORS))), str(rng.choice(SHAPES)), direction, radius, start, end)


def _path(thing: Thing, frames: int) -> Array:
    """Centres [F, 2]."""
    return np.linspace(thing.start, thing.end, frames)


def _apart(one: Thing, other: Thing, frames: int = 17) -> bool:
    gap = np.abs(_path(one, frames) - _path(other, frames)).max(1).min()
    return bool(gap > 1.07 * (one.radius + other.radius) + 2)


def _covers(scene: Scene) -> list[Array]:
    """Per thing the share of each pixel it covers: float [F, H, W]."""
    at = np.arange(scene.size) + 0.5
    covers = []
    for thing in scene.things:
        x, y = np.moveaxis(_path(thing, scene.frames), 1, 0)[..., None, None]
        outside = _distance(thing.shape, at[None, None] - x, at[None, :, None] - y, thing.radius)
        covers.append(np.clip(0.5 - outside, 0, 1))
    return covers


def _distance(shape: str, x: Array, y: Array, radius: float) -> Array:
    """Signed distance to the outline, negative inside."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - radius
    inner, below = 0.62 * radius, y - 0.25 * radius
    return np.maximum(math.sqrt(0.75) * np.abs(x) - 0.5 * below, below) - inner


# --- reading ---------------------------------------------------------------------------------------------


def foreground(clip: Clip) -> tuple[Mask, Array]:
    """What differs from the background (the median of the border): bool [F, H, W] and the background's rgb.

    A pixel is inside when it stands out at least half as much as the object color it is nearest to.
    """
    pixels = clip.astype(float)
    border = np.concatenate([pixels[:, 0], pixels[:, -1], pixels[:, :, 0], pixels[:, :, -1]], axis=1)
    background = np.median(border.reshape(-1, 3), axis=0)
    palette = np.array([*COLORS.values()], float)
    full = np.linalg.norm(palette - background, axis=-1)[_nearest_index(palette, pixels)]
    return np.linalg.norm(pixels - background, axis=-1) > np.maximum(MIN_CONTRAST, full / 2), background


def object_mask(clip: Clip, color: str) -> Mask:
    """The object of one color, for clips that show several: bool [F, H, W], empty where it is absent."""
    inside, background = foreground(clip)
    palette = np.array([*COLORS.values(), background], float)
    own = inside & (_nearest_index(palette, clip.astype(float)) == list(COLORS).index(color))
    return np.stack([_largest(frame) for frame in own])


def classify(clip: Clip) -> Verdict | None:
    """Say what one object does in a clip of any length, or None where most frames show no object."""
    inside, background = foreground(clip)
    bodies = np.stack([_largest(frame) for frame in inside])
    shown = np.flatnonzero(bodies.sum((1, 2)) >= MIN_AREA)
    if 2 * len(shown) <= len(clip):
        return None
    fill = np.array([np.median(clip[f][bodies[f]], axis=0) for f in shown])
    centres = np.array([np.argwhere(bodies[f])[:, ::-1].mean(0) for f in shown])
    overlaps = np.array([_overlaps(bodies[f]) for f in shown])
    move = _move(shown, centres, len(clip))
    return Verdict(
        color=_nearest(COLORS, np.median(fill, axis=0)),
        shape=SHAPES[int(overlaps.mean(0).argmax())],
        direction=_direction(move),
        background=_nearest(BACKGROUNDS, background),
        move=(float(move[0]), float(move[1])),
    )


def overlap(body: NDArray, shape: str) -> float:
    """IoU of one frame's body, bool [H, W], with a shape drawn to fill the same bounding box; 0 without a body."""
    return _overlaps(body)[SHAPES.index(shape)] if body.any() else 0.0


def _largest(mask: Mask) -> Mask:
    """The largest connected part of one frame, empty if below ``MIN_AREA``."""
    parts = np.asarray(label(mask, connectivity=1))
    areas = np.bincount(parts.ravel())[1:]
    if not areas.size or areas.max() < MIN_AREA:
        return np.zeros_like(mask)
    return parts == 1 + areas.argmax()


def _overlaps(body: Mask) -> list[float]:
    """IoU of one frame's body with each of ``SHAPES``, drawn to fill the same bounding box."""
    rows, columns = np.flatnonzero(body.any(1)), np.flatnonzero(body.any(0))
    crop = body[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    height, width = crop.shape
    y = ((np.arange(height) + 0.5) / height)[:, None]
    x = ((np.arange(width) + 0.5) / width)[None]
    templates = (np.hypot(2 * x - 1, 2 * y - 1) <= 1, (x >= 0) & (y >= 0), np.abs(2 * x - 1) <= y)
    return [float((crop & shape).sum() / (crop | shape).sum()) for shape in templates]


def _move(frames: NDArray, centres: Array, length: int) -> Array:
    """Displacement (dx, dy) over the whole clip from a least-squares line."""
    if len(frames) < 2:
        return np.zeros(2)
    return np.polyfit(frames.astype(float), centres, 1)[0] * (length - 1)


def _direction(move: Array) -> str | None:
    if np.abs(move).max() < MIN_MOVE:
        return None
    return max(DIRECTIONS, key=lambda name: float(np.dot(DIRECTIONS[name], move)))


def _nearest(palette: dict[str, tuple[int, int, int]], rgb: Array) -> str:
    return list(palette)[int(_nearest_index(np.array([*palette.values()], float), rgb))]


def _nearest_index(palette: Array, pixels: Array) -> NDArray[np.intp]:
    """Per pixel [..., 3] the place in ``palette`` [n, 3] of the color nearest to it."""
    distances = (palette**2).sum(-1) - 2 * pixels @ palette.T
    return distances.argmin(-1)
