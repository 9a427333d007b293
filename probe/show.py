"""The videos of a finished run: one that stands for it, the others beside it, and a contact sheet of all. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from probe import film
from probe.film import Frames

MAIN = "video"


@dataclass(frozen=True)
class Clip:
    """One video: its name, which is also that of its files, the text it was made from, and its frames."""

    name: str
    text: str
    frames: Frames


@dataclass(frozen=True)
class Show:
    """How the videos of a run are written: `main` are the names of the clips that video.mp4 shows side by side (none:
    the last), `title` stands above the contact sheet (empty: the clip's own text), and every file carries `comment`.
    """

    fps: int = 8
    main: tuple[str, ...] = ()
    title: str = ""
    comment: str = ""


def finish_video(folder: Path, clips: Sequence[Clip], show: Show) -> None:
    """Write video.mp4, video.gif and contact.png of a finished run, and <name>.mp4 and .gif of each clip that is not
    alone in them.

    Raises:
        StoreError: the disk refused.
    """
    main = show.main or (clips[-1].name,)
    together = [next(clip.frames for clip in clips if clip.name == name) for name in main]
    film.save_video(folder, np.concatenate(together, 2), show.fps, MAIN, show.comment)
    for clip in clips:
        if main != (clip.name,):
            film.save_video(folder, clip.frames, show.fps, clip.name, show.comment)
    rows = [_row(clip, show.fps, len(clips) > 1) for clip in clips]
    film.contact_sheet(folder / "contact.png", show.title or clips[-1].text, rows, show.comment)


def _row(clip: Clip, fps: int, several: bool) -> film.Row:
    pictures, notes = film.pick(clip.frames, 9)
    count = len(clip.frames)
    said = f"{count} frames, {fps} per second" if count > 1 else "one picture"
    return film.Row(f"{clip.name}: {clip.text} ({said})" if several else said, pictures, notes)
