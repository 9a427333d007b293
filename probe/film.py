"""Frames to files people look at: mp4, GIF, contact sheets, heat over frames. numpy, Pillow and imageio only.

Pixel frames are uint8 [F, H, W, 3].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from probe.comment import for_mp4, for_png
from probe.errors import StoreError

Frames = NDArray[np.uint8]

# cividis at even steps: readable by colour-blind people, monotone in grey
_HEAT = np.array(
    [
        (0, 34, 78),
        (18, 53, 112),
        (59, 73, 108),
        (87, 93, 109),
        (112, 113, 115),
        (138, 134, 120),
        (165, 156, 116),
        (195, 179, 105),
        (225, 204, 85),
        (254, 232, 56),
    ],
    float,
)
PAPER, INK, MUTED = (250, 249, 246), (32, 33, 36), (120, 122, 128)


@dataclass(frozen=True)
class Row:
    """One line of a contact sheet: a caption above pictures [N, H, W, 3], each with a small note below."""

    caption: str
    pictures: Frames
    notes: tuple[str, ...] = ()


def save_video(folder: Path, frames: Frames, fps: int, name: str = "video", comment: str = "") -> list[Path]:
    """Write <name>.mp4 (H.264) and <name>.gif; the paths written. Without ffmpeg only the GIF. Both carry `comment`
    (`probe.comment`).

    Raises:
        StoreError: the disk refused.
    """
    paths = [folder / f"{name}.gif"]
    try:
        save_gif(paths[0], frames, fps, comment)
        if has_ffmpeg():
            paths.insert(0, folder / f"{name}.mp4")
            save_mp4(paths[0], frames, fps, comment)
        return paths
    except OSError as error:
        raise StoreError(
            f"A video must be written to disk. Got '{error.strerror or error}' in {folder}. Free some space and run "
            "again."
        ) from error


def save_gif(path: Path, frames: Frames, fps: int, comment: str = "") -> None:
    """A looping GIF, small videos enlarged without smoothing."""
    pictures = [Image.fromarray(frame) for frame in enlarge(frames)]
    options: dict[str, Any] = {"duration": round(1000 / fps), "loop": 0}
    options |= {"comment": comment.encode()} if comment else {}
    pictures[0].save(path, save_all=True, append_images=pictures[1:], **options)


def save_mp4(path: Path, frames: Frames, fps: int, comment: str = "") -> None:
    """H.264 at quality 8, small videos enlarged without smoothing.

    Raises:
        StoreError: ffmpeg is not installed.
    """
    if not has_ffmpeg():
        raise StoreError(
            "An mp4 must be written by ffmpeg. Got none installed. pip install imageio-ffmpeg, or export a GIF."
        )
    options: dict[str, Any] = {"codec": "libx264", "quality": 8, "macro_block_size": 2}
    iio.imwrite(path, enlarge(frames), fps=fps, plugin="FFMPEG", output_params=for_mp4(comment), **options)


def has_ffmpeg() -> bool:
    """Whether mp4 files can be written and read here."""
    return find_spec("imageio_ffmpeg") is not None


def enlarge(frames: Frames, zoom: int | None = None) -> Frames:
    """Repeat pixels so that the shorter side reaches about 256; frames that are large already stay as they are."""
    zoom = zoom or max(1, 256 // min(frames.shape[1:3]))
    return frames.repeat(zoom, 1).repeat(zoom, 2)


def heat(values: NDArray[np.floating]) -> Frames:
    """Colours [.., 3] of values >= 0: 0 is the darkest colour, the largest value the brightest."""
    top = float(values.max()) or 1.0
    place = np.clip(values / top, 0, 1) * (len(_HEAT) - 1)
    low = np.minimum(place.astype(int), len(_HEAT) - 2)
    share = (place - low)[..., None]
    return (_HEAT[low] * (1 - share) + _HEAT[low + 1] * share).round().astype(np.uint8)


def overlay(frames: Frames, lift: NDArray[np.floating], opacity: float = 0.9) -> Frames:
    """Heat of a word map [T, Y, X] over the pixel frames it belongs to; one scale for the whole clip.

    A lift of 0 leaves the frame as it is, the peak covers it by `opacity`.

    Token frame 0 is pixel frame 0; token frame k covers pixel frames 4k-3 .. 4k (or whatever multiple fits).
    """
    tokens = frames_of_tokens(len(frames), len(lift))
    zoom = (frames.shape[1] // lift.shape[1], frames.shape[2] // lift.shape[2])
    grid = np.clip(lift, 0, None).repeat(zoom[0], 1).repeat(zoom[1], 2)[tokens]
    strength = opacity * grid[..., None] / (grid.max() or 1.0)
    return (frames * (1 - strength) + heat(grid) * strength).round().astype(np.uint8)


def frames_of_tokens(pixel_frames: int, token_frames: int) -> NDArray[np.intp]:
    """For each pixel frame its token frame: the first alone, the others in equal groups."""
    group = max(1, (pixel_frames - 1) // max(1, token_frames - 1))
    return np.minimum(-(-np.arange(pixel_frames) // group), token_frames - 1)


def pick(frames: Frames, count: int) -> tuple[Frames, tuple[str, ...]]:
    """`count` frames at even distances, first and last among them, and their numbers as notes."""
    index = np.unique(np.linspace(0, len(frames) - 1, min(count, len(frames))).round().astype(int))
    return frames[index], tuple(str(i) for i in index)


def contact_sheet(path: Path, title: str, rows: Sequence[Row], comment: str = "") -> Path:
    """A PNG with one line per row on paper white; it carries `comment`.

    Raises:
        StoreError: the disk refused.
    """
    sheet = _draw(title, rows)
    try:
        sheet.save(path, pnginfo=for_png(comment))
    except OSError as error:
        raise StoreError(
            f"A picture must be written to disk. Got '{error.strerror or error}' for {path}. Choose another place."
        ) from error
    return path


def _tiles(pictures: Frames, height: int = 128) -> Frames:
    """Pictures at the height of a sheet's tile: enlarged by whole pixels, or reduced smoothly."""
    if pictures.shape[1] <= height:
        return enlarge(pictures, height // pictures.shape[1])
    size = round(pictures.shape[2] * height / pictures.shape[1]), height
    return np.stack(
        [np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS)) for picture in pictures]
    )


def _draw(title: str, rows: Sequence[Row], gap: int = 6, margin: int = 20) -> Image.Image:
    rows = [Row(row.caption, _tiles(row.pictures), row.notes) for row in rows]
    height = sum(row.pictures.shape[1] + 46 for row in rows) + 2 * margin + 26
    width = max(len(row.pictures) * (row.pictures.shape[2] + gap) - gap for row in rows) + 2 * margin
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((margin, margin), title, fill=INK, font=ImageFont.load_default(18))
    top = margin + 32
    for row in rows:
        draw.text((margin, top), row.caption, fill=INK, font=ImageFont.load_default(13))
        for i, picture in enumerate(row.pictures):
            left = margin + i * (picture.shape[1] + gap)
            sheet.paste(Image.fromarray(picture), (left, top + 20))
            if i < len(row.notes):
                place = (left, top + 22 + picture.shape[0])
                draw.text(place, row.notes[i], fill=MUTED, font=ImageFont.load_default(11))
        top += row.pictures.shape[1] + 46
    return sheet
