"""Which tokens of a joint attention sequence are text, padding and video, and in what order.

The only module that turns "text" and "video" into slices. No torch: numbers only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from probe.errors import LayoutError

Order = Literal["text-video", "video-text"]


@dataclass(frozen=True)
class Grid:
    """Token grid of a video: token frames x rows x columns of patches.

    A token frame is `patch_size_t` latent frames (1 for CogVideoX-2B and 5B). Tokens are frame-major, then row, then
    column.
    """

    frames: int
    height: int
    width: int

    def __post_init__(self) -> None:
        if min(self.frames, self.height, self.width) < 1:
            raise LayoutError(
                f"A grid must have at least one token on each axis. Got {self}. Check the size of the video."
            )

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"

    @property
    def patches(self) -> int:
        """Tokens of one frame."""
        return self.height * self.width

    @property
    def size(self) -> int:
        """Tokens of the whole video."""
        return self.frames * self.patches

    @property
    def shape(self) -> tuple[int, int, int]:
        """(frames, height, width)."""
        return self.frames, self.height, self.width


@dataclass(frozen=True)
class TokenLayout:
    """The joint sequence: `text` text tokens (padding included) and the tokens of `grid`, in `order`.

    CogVideoX and FLUX put text first; SD3, HunyuanVideo and Mochi put video first.
    """

    order: Order
    text: int
    grid: Grid

    @property
    def total(self) -> int:
        """Length of the joint sequence."""
        return self.text + self.grid.size

    @property
    def text_slice(self) -> slice:
        """Where the text tokens are, padding included."""
        start = 0 if self.order == "text-video" else self.grid.size
        return slice(start, start + self.text)

    @property
    def video_slice(self) -> slice:
        """Where the video tokens are."""
        start = self.text if self.order == "text-video" else 0
        return slice(start, start + self.grid.size)

    def frame_slice(self, frame: int) -> slice:
        """Where the tokens of one token frame are, 0 <= frame < frames."""
        if not 0 <= frame < self.grid.frames:
            raise LayoutError(
                f"A frame must lie in 0 to {self.grid.frames - 1}. Got {frame}. Count token frames, not pixel frames."
            )
        start = self.video_slice.start + frame * self.grid.patches
        return slice(start, start + self.grid.patches)

    def frame_slices(self) -> Iterator[slice]:
        """The frames in order."""
        return (self.frame_slice(frame) for frame in range(self.grid.frames))
