"""Entropy and row log-normaliser: how many keys a row looks at, and how large its logits are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from probe.entry import Entry, Place, on_device
from probe.layout import TokenLayout
from probe.readout.base import Readout
from probe.readout.mass import ROWS
from probe.site import JOINT

STATISTICS = ("mean", "std", "p10", "p50", "p90")
"""Over the rows of a group: mean, standard deviation, 10th, 50th and 90th percentile."""

_ENTROPY = {
    "entropy": "mean entropy of the attention of {} rows, nats, 0 to log(keys)",
    "normalised_entropy": "mean entropy of {} rows over log(keys), 0 one key to 1 uniform",
    "effective_keys": "mean exp(entropy) of {} rows, 1 to the number of keys",
    "participation": "mean 1 / sum p^2 of {} rows, 1 to the number of keys",
}


@dataclass(eq=False)
class Entropy(Readout):
    """How widely the rows of text, padding and video look: entropy and the numbers of keys that follow from it.

    - `entropy`: H_i = -sum_j p_ij log p_ij = lse_i - scale q_i . sum_j p_ij k_j, nats, 0 to log(n_keys).
    - `normalised_entropy`: H_i / log(n_keys), 0 to 1 = uniform (Shannon efficiency). NaN for a single key.
    - `effective_keys`: exp(H_i), 1 to n_keys (perplexity, Hill number of order 1).
    - `participation`: 1 / sum_j p_ij^2 = exp(2 lse_i - lse_i(2 scale)), 1 to n_keys (Hill number of order 2).

    Joint over all keys that may be seen; `video_conditional` makes every p conditional on the video keys. Two more
    attentions per call: one with K in place of V, and one with doubled logits, which `participation=False` spares.

    After a run `values[at]` is a dict: name -> float32 [H, 3, 5], row groups ROWS x STATISTICS; a group without tokens
    is NaN. `rows=True` adds `rows`, the entropy of each video row [H, F, Y, X]. Error of the entropy of one row, for
    logits of a standard deviation up to 4: 5e-5 nats in float32, 8e-2 in bfloat16, 1e-2 in float16; it grows with the
    logits, and has either sign, so that a mean over hundreds of rows is 10 times better. Participation is as exact as
    the log-normaliser: relative error 5e-5, and 3e-4 in half precision.
    """

    video_conditional: bool = field(default=False, kw_only=True)
    rows: bool = field(default=False, kw_only=True)
    participation: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.video_conditional:
            self.kinds = JOINT | {"self"}

    @property
    def _measured(self) -> dict[str, str]:
        return {name: said for name, said in _ENTROPY.items() if name != "participation" or self.participation}

    @property
    def definitions(self) -> dict[str, str]:
        """What each of the metrics is."""
        end, given = ("_given_video", ", given the video") if self.video_conditional else ("", "")
        return {
            f"{name}_{group}{end}": said.format(group) + given
            for group in ("video", "text")
            for name, said in self._measured.items()
        }

    def reduce(self, entry: Entry) -> dict[str, Tensor]:
        """name -> [H, 3, 5], and `rows` [H, F, Y, X]."""
        seen = entry.within_video if self.video_conditional else entry
        entropy = entropy_of(seen)
        found = {
            "entropy": entropy,
            "normalised_entropy": entropy / math.log(seen.keys),
            "effective_keys": entropy.exp(),
        }
        if self.participation:
            found["participation"] = participation_of(seen)
        made = {name: _summary(values, entry.groups) for name, values in found.items()}
        return made | _video_rows(entry, entropy, self.rows)

    def metrics(self, value: Any) -> dict[str, NDArray[np.float32]]:
        """Means over video and over text rows [H]; see `definitions`."""
        means = [value[name][:, ROWS.index(group), 0] for group in ("video", "text") for name in self._measured]
        return dict(zip(self.definitions, means, strict=True))

    def cost(self, layout: TokenLayout) -> float:
        """All rows against the keys, once or twice."""
        return (1 + self.participation) * (layout.grid.size / layout.total if self.video_conditional else 1.0)


@dataclass(eq=False)
class LogNormaliser(Readout):
    """Row log-normaliser lse_i = log sum_j exp(scale q_i . k_j): how large the logits of a row are, in nats.

    At least log(n_keys) + the mean logit of the row, and at most log(n_keys) + its largest. It moves with any shift of
    the logits, unlike the attention itself.

    After a run `values[at]` is a dict: `lse` -> float32 [H, 3, 5], row groups ROWS x STATISTICS; a group without tokens
    is NaN. `rows=True` adds `rows`, the lse of each video row [H, F, Y, X]. It comes with the attention itself, at no
    cost. Source: definition; stable over steps in AdaSpa (arXiv 2502.21079). Error: 5e-5 nats in float32, 2e-4 in half
    precision.
    """

    rows: bool = field(default=False, kw_only=True)

    definitions: ClassVar[dict[str, str]] = {
        "lse_video": "mean log-normaliser of video rows, nats",
        "lse_text": "mean log-normaliser of text rows, nats",
    }

    def reduce(self, entry: Entry) -> dict[str, Tensor]:
        """`lse` [H, 3, 5], and `rows` [H, F, Y, X]."""
        return {"lse": _summary(entry.lse, entry.groups)} | _video_rows(entry, entry.lse, self.rows)

    def metrics(self, value: Any) -> dict[str, NDArray[np.float32]]:
        """Means over video and over text rows [H]."""
        return {f"lse_{group}": value["lse"][:, ROWS.index(group), 0] for group in ("video", "text")}


def entropy_of(entry: Entry) -> Tensor:
    """H_i = lse_i - scale q_i . (P K)_i in nats [H, N]."""
    mean_logit = torch.linalg.vecdot(entry.q.to(entry.lse.dtype), entry.mean_key) * entry.scale
    return (entry.lse - mean_logit).clamp(0, math.log(entry.keys))


def participation_of(entry: Entry) -> Tensor:
    """1 / sum_j p_ij^2 [H, N]."""
    return torch.exp(2 * entry.lse - entry.part(slice(None), sharpness=2)).clamp(1, entry.keys)


def _summary(values: Tensor, groups: Mapping[str, Place]) -> Tensor:
    """STATISTICS of values [H, N] over the rows of each group, [H, 3, 5]; NaN for an empty group."""
    return torch.stack([_statistics(values[:, groups[name]]) for name in ROWS], 1)


def _statistics(values: Tensor) -> Tensor:
    """[H, rows] to [H, 5]."""
    if not values.shape[1]:
        return values.new_full((len(values), len(STATISTICS)), math.nan)
    quantiles = torch.quantile(values, on_device((0.1, 0.5, 0.9), values.dtype, values.device), dim=1)
    return torch.stack([values.mean(1), values.std(1, correction=0), *quantiles], -1)


def _video_rows(entry: Entry, values: Tensor, asked: bool) -> dict[str, Tensor]:
    """Values of the video rows on the token grid [H, F, Y, X], if asked for."""
    return {"rows": values[:, entry.rows.video_slice].unflatten(1, entry.rows.grid.shape)} if asked else {}
