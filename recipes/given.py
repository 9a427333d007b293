"""A given video: read from its file, and brought to the size that a model is made for. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import imageio.v3 as iio
import numpy as np
from PIL import Image, ImageOps

from probe.errors import StoreError, UsageError
from probe.film import Frames, has_ffmpeg
from recipes.language.video import Video


@dataclass(frozen=True, eq=False)
class Given:
    """A video to start from: its file as it came, pixel frames uint8 [F, H, W, 3] of the model's size, the number of
    the prompt that tells it, and the first step that the run makes.
    """

    name: str
    data: bytes = field(repr=False)
    frames: Frames = field(repr=False)
    prompt: int
    step: int

    def __str__(self) -> str:
        return f"{self.name}, from step {self.step}"


def given_of(asked: Video, prompts: Sequence[str], shape: tuple[int, int, int], steps: int) -> Given:
    """The video of a recipe as pixel frames of `shape`, frames x rows x columns; `prompts` are the recipe's names.

    Raises:
        StoreError: the file is gone, no video, or cannot be decoded.
        UsageError: too few frames; too many or another size where the recipe refuses that; or a run of a single step.
    """
    prompt = 0 if asked.prompt is None else prompts.index(asked.prompt)
    path, step = Path(asked.file), first_step(asked.start, steps)
    return Given(path.name, _bytes(path), _fitted(_read(path, asked, shape[0]), asked, shape), prompt, step)


def first_step(start: float, steps: int) -> int:
    """The first step of a run that leaves out a share of the steps: neither the first of all, which is pure noise, nor
    beyond the last.

    Raises:
        UsageError: a run of a single step.
    """
    if steps < 2:
        raise UsageError(f"A run from a video must have 2 steps or more. Got {steps}. Take more steps.")
    return min(max(1, round(start * steps)), steps - 1)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StoreError(f"A video must be a readable file. Got {path}: {error.strerror}. Check its path.") from error


def _read(path: Path, asked: Video, count: int) -> Frames:
    """The frames that are asked for, [F, H, W, 3]: `count`, or one more where there are more."""
    gif = path.suffix.lower() == ".gif"
    if not gif and not has_ffmpeg():
        raise StoreError(
            f"A video must be read by ffmpeg. Got {path.name} and none installed. pip install imageio-ffmpeg, or give "
            "a GIF."
        )
    try:
        film = iio.imiter(path, plugin="pillow", mode="RGB") if gif else iio.imiter(path, plugin="FFMPEG")
        found = list(islice(film, asked.first, asked.first + asked.every * count + 1, asked.every))
    except (OSError, ValueError, RuntimeError, SyntaxError, EOFError) as error:
        cause = (str(error).splitlines() or ["nothing in it"])[0].rstrip(".")
        raise StoreError(
            f"A video must be one that ffmpeg can read, or a GIF. Got {path.name}: {cause}. Convert it to mp4."
        ) from error
    if len(found) < count:
        raise UsageError(
            f"A video must have {count} frames for this model. Got {len(found)} in {path.name}{_part(asked)}. Give a "
            "longer one."
        )
    return np.stack(found)


def _part(asked: Video) -> str:
    """What of the file is taken, if not all of it."""
    return f", one in {asked.every} from frame {asked.first} on" if asked.first or asked.every > 1 else ""


def _fitted(frames: Frames, asked: Video, shape: tuple[int, int, int]) -> Frames:
    count, height, width = shape
    if frames.shape[:3] != shape and asked.fit == "refuse":
        more = "more" if len(frames) > count else str(count)
        raise UsageError(
            f"A video must have {count} frames of {width} x {height} pixels for this model. Got {more} of "
            f"{frames.shape[2]} x {frames.shape[1]}. Write video.fit: resize to have it scaled and cut."
        )
    if frames.shape[1:3] == (height, width):
        return frames[:count]
    shrinks = frames.shape[1] >= height and frames.shape[2] >= width
    method = Image.Resampling.BOX if shrinks else Image.Resampling.BICUBIC
    pictures = map(Image.fromarray, frames[:count])
    return np.stack([np.asarray(ImageOps.fit(picture, (width, height), method)) for picture in pictures])
