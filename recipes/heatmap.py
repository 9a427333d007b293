"""Word maps of a run as numbers and pictures. No torch."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
from numpy.typing import NDArray

from probe import film
from probe.errors import UsageError
from probe.store import Run
from recipes.export import Writer, npz, write


@dataclass(frozen=True)
class Picked:
    """One word map [F, Y, X], lift (1.0 = uniform), and where in the run it is from; None is the mean of all.

    `segment` None is the whole video, frame by frame the mean of the segments that cover it.
    """

    word: str
    layer: int | None
    step: int | None
    head: int | None
    segment: int | None
    direction: str
    lift: NDArray[np.float32]

    @property
    def title(self) -> str:
        """One line that says what is seen."""
        parts = [
            f"{name} {value}"
            for name, value in (("layer", self.layer), ("step", self.step), ("head", self.head))
            if value is not None
        ]
        place = ", ".join(parts) or "mean of all layers, steps, heads"
        segment = "whole video" if self.segment is None else f"segment {self.segment}"
        return f"{self.word} · {self.direction} · {segment} · {place}"


def choose(
    run: Run, word: str, layer: int | None, step: int | None, head: int | None, segment: int | None, direction: str
) -> Picked:
    """Read one map; `segment` None is the whole video, each frame the mean of the segments that show the word there.

    Frames whose segments do not have the word are 0. Where each prompt has a video of its own, its number is its
    segment, and None is the prompt that the run shows, else the first that has the word.
    """

    word = next((known for known in run.words if known.casefold() == word.casefold()), word)

    def read(number: int | None) -> NDArray[np.float32]:
        return run.word_map(word, layer=layer, step=step, head=head, segment=number, direction=direction)

    having = sorted({s for s, role in run.segments if word in run.segment_words(s, role)})
    if segment is None and "names" in run.info and having:
        shown = run.info["names"].index(run.info["shown"][-1])
        segment = shown if shown in having else having[0]
    if segment is not None or len({s for s, _ in run.segments}) < 2 or not having:
        return Picked(word, layer, step, head, segment or 0, direction, read(segment))
    return Picked(word, layer, step, head, None, direction, _stitch(run, {s: read(s) for s in having}))


def _starts(run: Run) -> dict[int, int]:
    """First latent frame of every segment among those that the whole video shows; below 0 if that is not shown."""
    hidden = run.info.get("padding_frames", 0)
    return {segment: int(run.segment_attrs(segment)["start_frame"]) - hidden for segment, _ in run.segments}


def _latent(run: Run, lift: NDArray[np.float32]) -> NDArray[np.float32]:
    """A map by latent frames, of which a token frame may be several (CogVideoX 1.5)."""
    return np.repeat(lift, run.info.get("latent_frames_per_token", 1), 0)


def _stitch(run: Run, maps: dict[int, NDArray[np.float32]]) -> NDArray[np.float32]:
    """Maps of segments [F, Y, X] laid over each other in the time of the whole video, by latent frames."""
    starts, hidden = _starts(run), run.info.get("padding_frames", 0)
    frames, *place = _latent(run, next(iter(maps.values()))).shape
    total = np.zeros((hidden + max(starts.values()) + frames, *place), np.float32)
    count = np.zeros((len(total), 1, 1), np.float32)
    for segment, lift in maps.items():
        inside = slice(hidden + starts[segment], hidden + starts[segment] + frames)
        total[inside] += _latent(run, lift)
        count[inside] += 1
    return (total / np.maximum(count, 1)).astype(np.float32)[hidden:]


def summary(picked: Picked) -> dict[str, Any]:
    """Mean, peak and where it is."""
    frame, row, column = (int(i) for i in np.unravel_index(picked.lift.argmax(), picked.lift.shape))
    return {
        "map": picked.title,
        "shape": "x".join(str(n) for n in picked.lift.shape),
        "mean lift": f"{picked.lift.mean():.3f}",
        "peak lift": f"{picked.lift.max():.3f}",
        "peak at": f"frame {frame}, row {row}, column {column}",
        "per frame": ", ".join(f"{value:.2f}" for value in picked.lift.mean((1, 2))),
    }


def export(run: Run, picked: Picked, kind: str | None, out: Path | None) -> Path:
    """Write a map as npz, csv, png (contact sheet), gif or mp4 (heat over the frames).

    Raises:
        UsageError: pictures are asked for and the run has no video; see also `recipes.export.write`.
        StoreError: the file cannot be written.
    """
    writers: dict[str, Writer] = {
        "npz": lambda path: npz(path, {"lift": picked.lift, "title": np.array(picked.title)}),
        "csv": lambda path: _csv(picked, path),
        **pictures(run, picked, picked.title),
    }
    return write(writers, kind, out, run.path / f"{picked.word.replace(' ', '_')}_{picked.direction}")


def pictures(run: Run, picked: Picked, caption: str, opacity: float = 0.9) -> dict[str, Writer]:
    """What writes a map over the frames of its run as png, gif or mp4; the peak covers a frame by `opacity`."""

    def heated() -> film.Frames:
        return _heat(run, picked, opacity)[1]

    def sheet(path: Path) -> None:
        frames, over = _heat(run, picked, opacity)
        plain, notes = film.pick(frames, 9)
        rows = [film.Row("frames", plain), film.Row(caption, film.pick(over, 9)[0], notes)]
        film.contact_sheet(path, ", then ".join(run.info["prompts"]), rows)

    fps = int(run.info.get("fps", 8))
    return {
        "gif": lambda path: film.save_gif(path, heated(), fps),
        "mp4": lambda path: film.save_mp4(path, heated(), fps),
        "png": sheet,
    }


def _csv(picked: Picked, path: Path) -> None:
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["frame", "row", "column", "lift"])
        rows.writerows([*(int(i) for i in at), float(value)] for at, value in np.ndenumerate(picked.lift))


def _heat(run: Run, picked: Picked, opacity: float = 0.9) -> tuple[film.Frames, film.Frames]:
    """The pixel frames of the segment, and the same under the heat of the map."""
    if run.video is None:
        raise UsageError(
            f"A picture must have frames to lie on. Got a run without a video, {run.path}. Export npz or csv."
        )
    frames = _frames(run, picked.segment)
    if picked.segment is None:
        return frames, film.overlay(frames, picked.lift, opacity)
    whole, start = _stitch(run, {picked.segment: picked.lift}), _starts(run)[picked.segment]
    tokens = film.frames_of_tokens(len(frames), len(whole))
    inside = (tokens >= start) & (tokens < start + len(_latent(run, picked.lift)))
    return frames[inside], film.overlay(frames, whole, opacity)[inside]


def frames_of_segment(run: Run, segment: int, count: int) -> film.Frames:
    """For each of the `count` token frames of a segment the pixel frame in its middle, uint8 [count, H, W, 3].

    Raises:
        UsageError: the run has no video.
    """
    frames, starts, per = _frames(run, segment), _starts(run), run.info.get("latent_frames_per_token", 1)
    latent = film.frames_of_tokens(len(frames), max(starts.values()) + count * per) - starts[segment]
    inside = [np.flatnonzero(latent // per == token) for token in range(count)]
    return frames[[found[len(found) // 2] for found in inside]]


def _frames(run: Run, segment: int | None) -> film.Frames:
    """Pixel frames of the video, of that of one prompt where each has its own; of the GIF where no ffmpeg is
    installed.
    """
    video, names = run.video, run.info.get("names", ())
    assert video is not None
    own = video.with_stem(names[segment]) if names and segment is not None else video
    video = own if own.is_file() else video
    gif = video.with_suffix(".gif")
    if not film.has_ffmpeg() and gif.is_file():
        return np.asarray(iio.imread(gif))[..., :3]
    return np.asarray(iio.imread(str(video)))
