"""Token mass: how much each text token is looked at."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from probe.entry import Entry
from probe.layout import TokenLayout
from probe.readout.base import Readout
from probe.site import JOINT

_CHUNK = 2048  # rows whose weights on the text are held at a time


@dataclass(eq=False)
class TokenMass(Readout):
    """a_t: mean over the video rows of p_it, the probability that falls on text token t, 0 to 1. Source: definition.

    Joint over all keys, so the sum over t is the text mass of the video rows. Padding that may be seen is included; the
    prompt's `padding` tells it apart, its `tokens_of(word)` a word. `text_rows` adds the mean over the real text rows.
    Where text and video attend apart (Wan) the sum is one, and there are no text rows. The lift over uniform attention
    is a_t * keys (`probe.measure.enrichment`).

    After a run `values[at]` is a dict: `video` -> float32 [H, T], and `text` if asked for. Relative error: 5e-6 in
    float32, 1e-4 in half precision (the thin product is taken in float32).
    """

    text_rows: bool = field(default=False, kw_only=True)

    stored = "token_mass"
    definitions: ClassVar[dict[str, str]] = {
        "first_token_mass": "mean mass of video rows on the first text token, 0 to 1",
        "largest_token_mass": "mean mass of video rows on the text token that gets most, 0 to 1",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        self.kinds = JOINT if self.text_rows else JOINT | {"cross"}

    def reduce(self, entry: Entry) -> dict[str, Tensor]:
        """`video` [H, T], and `text` [H, T]."""
        tokens = torch.arange(entry.rows.total, device=entry.q.device)
        found = {"video": _mean_columns(entry, tokens[entry.rows.video_slice])}
        return found | ({"text": _mean_columns(entry, tokens[entry.groups["text"]])} if self.text_rows else {})

    def table(self, value: Any) -> NDArray[np.float32]:
        """What the video rows give to each text token [H, T]."""
        return value["video"]

    def metrics(self, value: Any) -> dict[str, NDArray[np.float32]]:
        """Numbers per head [H]; see `definitions`."""
        return {"first_token_mass": value["video"][:, 0], "largest_token_mass": value["video"].max(-1)}

    def cost(self, layout: TokenLayout) -> float:
        """The text columns."""
        return layout.text / layout.total


def _mean_columns(entry: Entry, rows: Tensor) -> Tensor:
    """Mean over rows of the weights on each text token, [H, T]."""
    total = torch.zeros_like(entry.lse[:, :1]).expand(-1, entry.columns.text)
    for some in rows.split(_CHUNK):
        total = total + entry.weights(some, entry.columns.text_slice).sum(1)
    return total / len(rows)
