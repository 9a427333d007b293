"""What is there to judge of a video: its frames as they were compressed, and which prompt is shown when.

Frames are uint8 [F, H, W, 3]; a span is (start, stop) in frames, where frame f covers [f, f + 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import imageio.v3 as iio
import numpy as np
from numpy.typing import NDArray

from ditctrl.duration import shown
from ditctrl.metric import Span
from probe import film, mask
from probe.errors import StoreError, UsageError
from probe.store import Run
from recipes.cut import Cut
from recipes.heatmap import choose
from recipes.job import Job, prepare
from recipes.language import parse
from recipes.maskfile import Rule


@dataclass(frozen=True)
class Footage:
    """Frames, frames per second, and the prompts in the order they are shown, each with its span."""

    frames: film.Frames
    fps: float
    prompts: tuple[str, ...]
    spans: tuple[Span, ...]


def of_run(run: Run) -> Footage:
    """The video of a run. Its prompts are shown as its recipe means it: for segments `ditctrl.duration.shown`, for
    windows the same rule, else the one prompt that the video is of (of several side by side the last).

    Raises:
        StoreError: the run has no video, or a damaged one.
        ModelError: the configuration of its model is needed and not here.
    """
    if run.video is None:
        raise StoreError(
            f"A run must have a video to be evaluated. Got {run.path}, which is {run.status} and has none. Finish it "
            f"with: mmdit resume {run.path}"
        )
    names, fps = run.info.get("names"), float(run.info.get("fps", 8))
    texts: tuple[str, ...] = tuple(run.info["prompts"])
    if names:
        number = names.index(run.info["shown"][-1])
        own = run.video.with_stem(names[number])
        frames = read(own if own.is_file() else run.video)
        return Footage(frames, fps, (texts[number],), ((0, len(frames)),))
    frames = read(run.video)
    job = prepare(parse.load(str(run.path / "recipe.yaml"))) if len(texts) > 1 else None
    if job is None or not job.joined:
        return Footage(frames, fps, texts[-1:], ((0, len(frames)),))
    if job.connected is not None:  # clips by themselves, one after the other
        return Footage(frames, fps, texts, _equal(len(frames), len(texts)))
    meant = _shown(job)
    spans = _pixels([span for _, span in meant], job.frames, len(frames))
    return Footage(frames, fps, tuple(texts[at] for at, _ in meant), spans)


def of_file(path: Path, prompts: Sequence[str]) -> Footage:
    """A video file; of several prompts each is taken to be shown for an equal part.

    Raises:
        UsageError: no prompt.
        StoreError: the file cannot be read.
    """
    if not prompts:
        raise UsageError(
            f"A video file must come with what it should show. Got {path} without a prompt. Give --prompt, once for "
            "each prompt in order."
        )
    frames = read(path)
    return Footage(frames, _fps(path), tuple(prompts), _equal(len(frames), len(prompts)))


def read(path: Path) -> film.Frames:
    """Every frame of an mp4 or GIF. Without ffmpeg the GIF beside an mp4 is read instead.

    Raises:
        StoreError: it is not there, damaged, or an mp4 without an ffmpeg to read it.
    """
    gif = path.with_suffix(".gif")
    if not film.has_ffmpeg() and path.suffix != ".gif":
        if not gif.is_file():
            raise StoreError(
                f"An mp4 must be read by ffmpeg. Got none installed for {path}. Run: pip install imageio-ffmpeg"
            )
        path = gif
    try:
        frames = np.asarray(iio.imread(str(path)))[..., :3]
        if frames.ndim != 4 or not frames.size:
            raise ValueError(f"an array of {frames.shape}, no frames")
    except (OSError, ValueError, RuntimeError, StopIteration) as error:
        cause = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
        raise StoreError(f"A video must be readable. Got {path}: {cause}. Make it again, or give another.") from error
    return frames


def object_mask(run: Run, words: Sequence[str], frames: film.Frames) -> mask.Mask:
    """Where any of the words is, bool [F, H, W], False in frames of prompts that do not have them.

    The words' recorded maps (text rows that look at the video where they were recorded, else video rows; mean of all
    steps, layers and heads) cut by Otsu, each token's mask in all of its pixels.

    Raises:
        WordError: a word was not recorded.
        UsageError: no maps were recorded.
    """
    cuts = [Rule().cut(choose(run, word, None, None, None, None, direction_of(run)).lift) for word in words]
    inside = np.any(cuts, axis=0)
    rows, columns = (
        (2 * np.arange(pixels) + 1) * tokens // (2 * pixels)
        for pixels, tokens in zip(frames.shape[1:3], inside.shape[1:], strict=True)
    )
    return inside[film.frames_of_tokens(len(frames), len(inside))][:, rows][:, :, columns]


def direction_of(run: Run) -> str:
    """The direction of a run's maps that lies closer on objects, of those recorded."""
    heads = [segment.heads for head in run.index.heads() for segment in head.segments.values()]
    return "tv" if any("maps/tv" in one for one in heads) else "vt"


def _equal(frames: int, parts: int) -> tuple[Span, ...]:
    """The spans of so many equal parts."""
    return tuple(pairwise(np.linspace(0, frames, parts + 1).tolist()))


def _shown(job: Job) -> list[tuple[int, Span]]:
    """(prompt, span in latent frames) in order."""
    if job.segments is not None:
        return list(enumerate(shown(job.segments)))
    assert job.cut is not None
    return windows(job.cut)


def windows(cut: Cut) -> list[tuple[int, Span]]:
    """(prompt, span in latent frames) in order: a prompt ends halfway between the middle of its last window and that of
    the next prompt's first.
    """
    starts = np.asarray(cut.starts, float)
    changes = [at for at, (one, other) in enumerate(pairwise(cut.prompts), 1) if one != other]
    edges = [0.0, *((starts[at - 1] + starts[at] + cut.length) / 2 for at in changes), float(cut.frames)]
    return [(cut.prompts[at], span) for at, span in zip([0, *changes], pairwise(edges), strict=True)]


def _pixels(spans: Sequence[Span], latent: int, pixel: int) -> tuple[Span, ...]:
    """Spans in pixel frames: the first latent frame is one of them, each other as many as fit."""
    edges: NDArray[np.float64] = np.interp(np.asarray(spans), [0, 1, latent], [0, 1, pixel])
    return tuple((float(start), float(stop)) for start, stop in edges)


def _fps(path: Path) -> float:
    """Frames per second of a video file, 8 where it does not say."""
    meta = iio.immeta(str(path))
    return float(meta.get("fps") or (1000 / meta["duration"] if meta.get("duration") else 8))
