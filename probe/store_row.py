"""One row of an attention matrix, computed from the query and key that a step file kept. numpy only.

Shapes: H heads, N tokens that look, M that are looked at, D head width, F frames, Y rows and X columns of patches.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from probe.errors import UsageError
from probe.layout import Grid, TokenLayout
from probe.store_read import Place, SegmentHead, read_array, read_shape

Patch = tuple[int, int, int]
"""Frame, row and column of a patch, each from 0."""

_HEADS = 8  # read and multiplied at once: 36 MB of float32 for CogVideoX-2B


def softmax_rows(query: np.ndarray, key: np.ndarray, scale: float) -> np.ndarray:
    """softmax(scale * key @ query) of one query [H, D] over keys [H, M, D]: float32 [H, M], each row sums to 1.

    Computed in float32. Where logits are at most 60 in size, it is within 5e-5 of each probability (plus 1e-30) of what
    float64 gives for the same float16 tensors.
    """
    logits = np.matmul(key.astype(np.float32), query.astype(np.float32)[..., None])[..., 0] * np.float32(scale)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def attention_row(
    path: Path, place: Place, segment: SegmentHead, layer: int, kind: str, head: int | None, token: int | Patch
) -> tuple[np.ndarray, np.ndarray]:
    """Return what one token looks at, as probabilities: video float32 [F, Y, X] and text float32 [T].

    `kind` is one of `segment.qk[layer]`; `head` None is the mean over heads. A cross attention has no video keys: the
    video is 0 there.

    Raises:
        UsageError: the token is not one of the rows, or the query and key do not fit the grid of the segment.
    """
    names = [f"{segment.qk[layer][kind]}/{name}" for name in "qk"]
    (heads, rows, width), (_, columns, _) = (read_shape(path, place, name) for name in names)
    looking, seen = _layouts(segment, rows, columns, kind == "cross")
    row, scale = _row_of(token, looking), float(segment.attrs.get("scale") or width**-0.5)
    chosen = range(heads) if head is None else range(head, head + 1)
    total = np.zeros(columns)
    for first in range(chosen.start, chosen.stop, _HEADS):
        part = slice(first, min(first + _HEADS, chosen.stop))
        query, key = (read_array(path, place, name, at) for name, at in zip(names, ((part, row), part), strict=True))
        total += softmax_rows(query, key, scale).sum(0, dtype=np.float64)
    mean = (total / len(chosen)).astype(np.float32)
    video = mean[seen.video_slice] if seen.video else np.zeros(seen.grid.size, np.float32)
    return video.reshape(seen.grid.shape), mean[seen.text_slice]


def _layouts(segment: SegmentHead, rows: int, columns: int, cross: bool) -> tuple[TokenLayout, TokenLayout]:
    """What the rows and the columns of the kept attention are."""
    grid = Grid(*segment.attrs["grid"])
    looking = TokenLayout(segment.attrs.get("order", "text-video"), rows - grid.size, grid)
    seen = looking.text_alone(columns) if cross else looking.with_text(columns - grid.size)
    if min(looking.text, seen.text) < 0:
        raise UsageError(
            f"query and key must cover the grid {grid} of their segment. Got {rows} rows and {columns} columns. "
            "Record them with the grid they were made on."
        )
    return looking, seen


def _row_of(token: int | Patch, looking: TokenLayout) -> int:
    """Where a text token, or a patch, stands among the rows."""
    if isinstance(token, int):
        if not 0 <= token < looking.text:
            have = f"{looking.text} text tokens, counted from 0" if looking.text else "rows of the video only"
            raise UsageError(f"A text token must be a row of this attention. Got {token}. It has {have}.")
        return looking.text_slice.start + token
    if len(token) != 3 or not all(0 <= at < size for at, size in zip(token, looking.grid.shape, strict=True)):
        raise UsageError(
            f"A patch must be (frame, row, column) in the grid {looking.grid}. Got {token}. Count each from 0."
        )
    return looking.video_slice.start + int(np.ravel_multi_index(token, looking.grid.shape))
