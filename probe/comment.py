"""The text that a picture or a video carries along: PNG, GIF and mp4. Pillow and ffmpeg only, no torch."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from PIL import Image, PngImagePlugin, UnidentifiedImageError

from probe.errors import StoreError

LONGEST = 100_000
"""Bytes of a comment that ffmpeg takes as one argument; a longer one is left out of an mp4."""

CARRIERS = (".mp4", ".gif", ".png")
"""Endings of the files that can carry one."""

_KEY = "comment"
_ESCAPED = re.compile(rf"^{_KEY}=((?:[^\\\n]|\\.)*)", re.MULTILINE | re.DOTALL)


def for_png(comment: str) -> PngImagePlugin.PngInfo:
    """What Pillow writes into a PNG."""
    info = PngImagePlugin.PngInfo()
    if comment:
        info.add_itxt(_KEY, comment)
    return info


def for_mp4(comment: str) -> list[str]:
    """What ffmpeg is told."""
    return ["-metadata", f"{_KEY}={comment}"] if 0 < len(comment.encode()) <= LONGEST else []


def comment_of(path: Path) -> str:
    """The text a file carries, empty where it has none.

    Raises:
        StoreError: it is no PNG, GIF or mp4, or cannot be read.
    """
    try:
        return _of_mp4(path) if path.suffix.lower() == ".mp4" else _of_picture(path)
    except (OSError, ValueError, SyntaxError, subprocess.SubprocessError, Image.DecompressionBombError) as error:
        cause = "no picture" if isinstance(error, UnidentifiedImageError) else " ".join(str(error).split())[:200]
        raise StoreError(
            f"A file to read a recipe from must be a readable mp4, GIF or PNG. Got {path}: {cause}. Give another file."
        ) from error


def _of_picture(path: Path) -> str:
    with Image.open(path, formats=("PNG", "GIF")) as picture:
        text = picture.info.get(_KEY, "")
    return text.decode("utf-8") if isinstance(text, bytes) else str(text)


def _of_mp4(path: Path) -> str:
    """As ffmpeg prints it: one line per key, with =, ;, #, \\ and ends of lines escaped."""
    try:
        from imageio_ffmpeg import get_ffmpeg_exe
    except ImportError as error:
        raise OSError("no ffmpeg is installed, pip install imageio-ffmpeg") from error
    command = [get_ffmpeg_exe(), "-v", "error", "-i", f"file:{path}", "-f", "ffmetadata", "-"]
    said = subprocess.run(command, capture_output=True, check=True, timeout=60).stdout.decode("utf-8")
    found = _ESCAPED.search(said)
    return re.sub(r"\\(.)", r"\1", found.group(1), flags=re.DOTALL) if found else ""
