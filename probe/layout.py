"""Which tokens of a joint attention sequence are text, padding and video, and in what order.

The only module that turns "text" and "video" into slices. No torch: numbers only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
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
    """A token sequence: `text` text tokens (padding included) and the tokens of `grid`, in `order`.

    CogVideoX and FLUX put text first; SD3, HunyuanVideo and Mochi put video first. A sequence of video alone has no
    text tokens; one of text alone (the keys of cross attention) keeps its `grid` and sets `video` to False.
    """

    order: Order
    text: int
    grid: Grid
    video: bool = True

    @property
    def total(self) -> int:
        """Length of the sequence."""
        return self.text + (self.grid.size if self.video else 0)

    @property
    def frames(self) -> int:
        """Token frames in the sequence, 0 without video."""
        return self.grid.frames if self.video else 0

    def with_text(self, text: int) -> TokenLayout:
        """The same with another number of text tokens; 0 leaves the video alone."""
        return replace(self, text=text)

    def text_alone(self, text: int) -> TokenLayout:
        """Only `text` text tokens."""
        return replace(self, text=text, video=False)

    @property
    def text_slice(self) -> slice:
        """Where the text tokens are, padding included."""
        start = 0 if self.order == "text-video" else self.total - self.text
        return slice(start, start + self.text)

    @property
    def video_slice(self) -> slice:
        """Where the video tokens are."""
        start = self.text if self.order == "text-video" else 0
        return slice(start, start + self.total - self.text)

    def frame_slice(self, frame: int) -> slice:
        """Where the tokens of one token frame are, 0 <= frame < frames."""
        if not 0 <= frame < self.frames:
            raise LayoutError(
                f"A frame must lie in 0 to {self.frames - 1}. Got {frame}. Count token frames, not pixel frames."
            )
        start = self.video_slice.start + frame * self.grid.patches
        return slice(start, start + self.grid.patches)

    def parts(self) -> tuple[slice, ...]:
        """The frames in order, then the text if there is any: together the whole sequence."""
        return (*self.frame_slices(), *([self.text_slice] if self.text else []))

    def frame_slices(self) -> Iterator[slice]:
        """The frames in order."""
        return (self.frame_slice(frame) for frame in range(self.frames))
