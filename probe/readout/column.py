"""Column mass: how much attention every key receives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from probe import measure
from probe.entry import Entry
from probe.layout import TokenLayout
from probe.readout.base import Readout
from probe.readout.mass import ROWS

GROUPS = ("all", *ROWS)
TAU = 10.0
"""A column is a sink when it receives more than this many times its uniform share."""

SINK_MASS = f"mass of the video rows on columns with more than {TAU:g} times their uniform share, 0 to 1"
TEXT_MASS = "mass of the video rows on the text columns, padding included, 0 to 1"


@dataclass(eq=False)
class ColumnMass(Readout):
    """`c_j`: mean over the rows of a group of the probability p_ij that falls on key j, joint over all keys.

    After a run `values[at]` is a dict: `mass` float32 [H, 4, N] over GROUPS x keys, each row summing to one, NaN for a
    group without tokens; `text` float32 [H], what the video rows give to the text. What is stored is `mass` of all
    rows. Large: 8.5 MB per call of CogVideoX-2B.

    Exact, by one swapped call per group over its own rows, together the work of one attention; see `probe.transpose`.
    Relative error 1e-5 in float32, 2e-4 in half precision. Source: this identity; sinks as in Xiao et al. 2024
    (StreamingLLM, arXiv 2309.17453).
    """

    stored: ClassVar[str] = "columns"
    definitions: ClassVar[dict[str, str]] = {
        "sink_score": "mass of the strongest column over the video rows, max_j c_j, 1 / N to 1",
        "sink_mass": SINK_MASS,
        "text_mass": TEXT_MASS,
    }

    def reduce(self, entry: Entry) -> dict[str, Tensor]:
        """`mass` [H, 4, N] and `text` [H]."""
        video = entry.video_columns
        means = [*(entry.column_means(entry.groups[name]) for name in ("text", "padding")), video]
        sizes = [entry.lse[:, entry.groups[name]].shape[1] for name in ROWS]
        shares = [mean * (size / sum(sizes)) for mean, size in zip(means, sizes, strict=True)]
        return {
            "mass": torch.stack([torch.stack(shares).nansum(0), *means], 1),
            "text": video[:, entry.columns.text_slice].sum(-1),
        }

    def cost(self, layout: TokenLayout) -> float:
        """One attention."""
        return 1.0

    def metrics(self, value: Any) -> dict[str, NDArray[np.float32]]:
        """See `definitions`."""
        video = value["mass"][:, GROUPS.index("video")]
        return {
            "sink_score": measure.sink_score(video),
            "sink_mass": measure.sink_mass(video, TAU),
            "text_mass": value["text"],
        }

    def table(self, value: Any) -> NDArray[np.float32]:
        """[H, N], the mean over all rows."""
        return value["mass"][:, GROUPS.index("all")]
