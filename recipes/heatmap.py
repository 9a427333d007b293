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
from probe.errors import StoreError, UsageError
from probe.store import Run


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

    Frames whose segments do not have the word are 0.
    """

    word = next((known for known in run.words if known.casefold() == word.casefold()), word)

    def read(number: int | None) -> NDArray[np.float32]:
        return run.word_map(word, layer=layer, step=step, head=head, segment=number, direction=direction)

    having = sorted({s for s, role in run.segments if word in run.segment_words(s, role)})
    if segment is not None or len({s for s, _ in run.segments}) < 2 or not having:
        return Picked(word, layer, step, head, segment or 0, direction, read(segment))
    return Picked(word, layer, step, head, None, direction, _stitch(run, {s: read(s) for s in having}))


def _starts(run: Run) -> dict[int, int]:
    """First latent frame of every segment in the whole video."""
    return {segment: int(run.segment_attrs(segment)["start_frame"]) for segment, _ in run.segments}


def _stitch(run: Run, maps: dict[int, NDArray[np.float32]]) -> NDArray[np.float32]:
    """Maps of segments [F, Y, X] laid over each other in the time of the whole video."""
    starts = _starts(run)
    frames, *place = next(iter(maps.values())).shape
    total = np.zeros((max(starts.values()) + frames, *place), np.float32)
    count = np.zeros((len(total), 1, 1), np.float32)
    for segment, lift in maps.items():
        total[starts[segment] : starts[segment] + frames] += lift
        count[starts[segment] : starts[segment] + frames] += 1
    return (total / np.maximum(count, 1)).astype(np.float32)


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
        UsageError: pictures are asked for and the run has no video.
        StoreError: the file cannot be written.
    """
    kind = kind or (out.suffix[1:] if out else "")
    if kind not in _WRITERS or (out is not None and out.suffix != f".{kind}"):
        raise UsageError(
            f"An export must be a file ending in {', '.join('.' + name for name in _WRITERS)}. Got {out or kind}. "
            "Name --out by its kind, or leave it out."
        )
    path = out or run.path / f"{picked.word.replace(' ', '_')}_{picked.direction}.{kind}"
    try:
        _WRITERS[kind](run, picked, path)
    except OSError as error:
        raise StoreError(
            f"An export must be written to disk. Got '{error.strerror or error}' for {path}. Choose another --out."
        ) from error
    return path


def _npz(run: Run, picked: Picked, path: Path) -> None:
    with path.open("wb") as file:
        np.savez_compressed(file, lift=picked.lift, title=np.array(picked.title))


def _csv(run: Run, picked: Picked, path: Path) -> None:
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["frame", "row", "column", "lift"])
        rows.writerows([*(int(i) for i in at), float(value)] for at, value in np.ndenumerate(picked.lift))


def _gif(run: Run, picked: Picked, path: Path) -> None:
    film.save_gif(path, _heat(run, picked)[1], int(run.info.get("fps", 8)))


def _mp4(run: Run, picked: Picked, path: Path) -> None:
    film.save_mp4(path, _heat(run, picked)[1], int(run.info.get("fps", 8)))


def _png(run: Run, picked: Picked, path: Path) -> None:
    frames, heated = _heat(run, picked)
    plain, notes = film.pick(frames, 9)
    rows = [film.Row("frames", plain), film.Row(picked.title, film.pick(heated, 9)[0], notes)]
    film.contact_sheet(path, ", then ".join(run.info["prompts"]), rows)


_WRITERS = {"npz": _npz, "csv": _csv, "gif": _gif, "mp4": _mp4, "png": _png}


def _heat(run: Run, picked: Picked) -> tuple[film.Frames, film.Frames]:
    """The pixel frames of the segment, and the same under the heat of the map."""
    if run.video is None:
        raise UsageError(
            f"A picture must have frames to lie on. Got a run without a video, {run.path}. Export npz or csv."
        )
    frames = _frames(run)
    if picked.segment is None:
        return frames, film.overlay(frames, picked.lift)
    whole, start = _stitch(run, {picked.segment: picked.lift}), _starts(run)[picked.segment]
    tokens = film.frames_of_tokens(len(frames), len(whole))
    inside = (tokens >= start) & (tokens < start + len(picked.lift))
    return frames[inside], film.overlay(frames, whole)[inside]


def _frames(run: Run) -> film.Frames:
    """Pixel frames of the video; of the GIF where no ffmpeg is installed."""
    gif = run.path / "video.gif"
    if not film.has_ffmpeg() and gif.is_file():
        return np.asarray(iio.imread(gif))[..., :3]
    return np.asarray(iio.imread(str(run.video)))
