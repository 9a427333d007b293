"""Sinks: which keys take an outsized share of the attention, where they are, and whether they matter."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from probe import attend
from probe.entry import Entry
from probe.errors import UsageError
from probe.layout import TokenLayout
from probe.readout.base import Readout
from probe.readout.column import TAU

PLACES = ("text", "first_token", "padding", "first_frame", "border")
"""Real text tokens (the first one among them), padding, frame 0, and the outermost patches of every frame."""

_DEFINITIONS = {
    "sink_count": "number of sink columns of the head, those with {rule}",
    "sink_value_norm": "mean of |v_j| / median |v| over the sinks, 1 = like any key, NaN without sinks",
    "sink_key_norm": "mean of |k_j| / median |k| over the sinks, 1 = like any key, NaN without sinks",
    "sink_removed": "|dO| / |O| of the video rows without the sinks, renormalised, NaN without sinks",
    "sink_zeroed": "|dO| / |O| of the video rows with the values of the sinks at 0, NaN without sinks",
}


@dataclass(eq=False, kw_only=True)
class Sinks(Readout):
    """The sink set of each head, what its keys are like, and what removing it does to the output of the video rows.

    `c_j` is the mean over the video rows of p_ij. A key is a sink when c_j N > `tau`: more than tau times its uniform
    share. With `eps` it is one when c_j > eps instead, the absolute convention of language models (0.3 there), which
    does not depend on the number of keys.

    Inertness of the set S is |dO| / |O|, Frobenius norms over the video rows of a head: `removed` takes S out of the
    softmax and renormalises the rest, dO = m (O_rest - O_S) with m the mass on S; `zeroed` keeps the weights and sets
    the values of S to 0, dO = -m O_S. Both are exact, from attention over S and over its complement, not by
    subtraction. NaN for a head without sinks. A sink in the strict sense has much mass and a small dO.

    After a run `values[at]` is a dict, K = `most` or the number of keys:
    - `columns` int [H, K] the keys of most mass, strongest first; `enrichment` c_j N, `value_norm` and `key_norm` float
      [H, K]: |v_j| and |k_j| over their median over all keys of the head. All keys of the set are there if count <= K;
    - `count` int [H] size of the set, `places` int [H, 5] how many of it lie in each of PLACES;
    - `value_ratio` and `key_ratio` float [H], mean norm ratios over the set; `removed` and `zeroed` float [H].

    Extra work: one swapped call, and where a head has sinks one call for those heads and a thin one; which heads these
    are is read back, so the program waits for the device. Errors: masses
    1e-5 in float32, 2e-4 in half precision; `removed` and `zeroed` 1e-5, 1e-2 in half precision. Source: attention
    sinks in Xiao et al. 2024 (arXiv 2309.17453); inertness as in Wen et al. 2025 (arXiv 2504.10317), own measure.

    Raises:
        UsageError: tau below 1, eps outside 0 to 1, or most below 1.
    """

    tau: float = TAU
    eps: float | None = None
    most: int = 16

    def __post_init__(self) -> None:
        if self.tau < 1 or self.most < 1 or not 0 < (0.5 if self.eps is None else self.eps) < 1:
            raise UsageError(
                f"Sinks must have tau >= 1, 0 < eps < 1 and most >= 1. Got {self.tau}, {self.eps} and {self.most}. "
                "Leave them out for 10 times the uniform share."
            )
        super().__post_init__()

    @property
    def definitions(self) -> dict[str, str]:
        """What each of the metrics is."""
        rule = f"c_j N > {self.tau:g}" if self.eps is None else f"c_j > {self.eps:g}"
        said = {name: text.format(rule=rule) for name, text in _DEFINITIONS.items()}
        return said | {f"sinks_{place}": f"number of sinks in {place.replace('_', ' ')}" for place in PLACES}

    def reduce(self, entry: Entry) -> dict[str, Tensor]:
        """See the class."""
        columns = entry.video_columns
        sinks = columns * entry.keys > self.tau if self.eps is None else columns > self.eps
        own = entry.k[..., : entry.k.shape[-1] - entry.extra]
        value, key = (_norm_ratio(x, columns.dtype) for x in (entry.v, own))
        mass, top = columns.topk(min(self.most, entry.keys))
        removed, zeroed = _inertness(entry, sinks)
        return {
            "columns": top,
            "enrichment": mass * entry.keys,
            "value_norm": value.gather(1, top),
            "key_norm": key.gather(1, top),
            "count": sinks.sum(-1),
            "places": (sinks[:, None] & _places(entry)).sum(-1),
            "value_ratio": (value * sinks).sum(-1) / sinks.sum(-1),
            "key_ratio": (key * sinks).sum(-1) / sinks.sum(-1),
            "removed": removed,
            "zeroed": zeroed,
        }

    def cost(self, layout: TokenLayout) -> float:
        """The swapped call and, at most, one over the complements."""
        return 2.0

    def metrics(self, value: Any) -> dict[str, NDArray[np.float32]]:
        """See `definitions`."""
        names = ("count", "value_ratio", "key_ratio", "removed", "zeroed")
        heads = [value[name] for name in names] + list(value["places"].T)
        return {name: np.asarray(one, np.float32) for name, one in zip(self.definitions, heads, strict=True)}


def _norm_ratio(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Norms of [H, M, D] over their median in the head, [H, M]."""
    norms = torch.linalg.vector_norm(x, dim=-1, dtype=dtype)
    return norms / norms.median(-1, keepdim=True).values


def _places(entry: Entry) -> Tensor:
    """bool [5, M]: which keys lie in each of PLACES."""
    layout, groups = entry.columns, entry.column_groups
    places = torch.zeros(len(PLACES), layout.total, dtype=torch.bool, device=entry.q.device)
    text, first_token, padding, first_frame, border = places
    text[groups["text"]] = padding[groups["padding"]] = True
    first = slice(layout.text_slice.start, layout.text_slice.start + min(layout.text, 1))
    first_token[first] = text[first]
    if layout.frames:
        first_frame[layout.frame_slice(0)] = True
        inside = torch.ones(layout.grid.shape, dtype=torch.bool, device=border.device)
        inside[:, 1:-1, 1:-1] = False
        border[layout.video_slice] = inside.flatten()
    return places


def _inertness(entry: Entry, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """|dO| / |O| [H] over the video rows, without the sinks [H, M] of each head and with their values at 0."""
    removed, zeroed = (torch.full_like(entry.lse[:, 0], math.nan) for _ in range(2))
    heads = sinks.any(-1).nonzero()[:, 0]
    if len(heads):
        rest, own = _halves(entry, heads, sinks[heads])
        out, lse = attend.merge(own, rest)
        mass = attend.mass(own, lse)[0, ..., None]
        size = _size(out[0])
        removed[heads] = _size(mass * (rest.out - own.out)[0]) / size
        zeroed[heads] = _size(mass * own.out[0]) / size
    return removed, zeroed


def _halves(entry: Entry, heads: Tensor, sinks: Tensor) -> tuple[attend.State, attend.State]:
    """Attention of the video rows over all keys but the sinks, and over the sinks alone: gathered, few."""
    q, k, v = entry.q[heads, entry.rows.video_slice], entry.k[heads], entry.v[heads]
    rest = attend.partial(q[None], k[None], v[None], entry.scale, _hiding(sinks, entry.lse.dtype))
    most = int(sinks.sum(-1).max())
    found, at = sinks.to(torch.uint8).topk(most)
    k, v = (x.take_along_dim(at[..., None], 1) for x in (k, v))
    own = attend.partial(q[None], k[None], v[None], entry.scale, _hiding(found == 0, entry.lse.dtype))
    return rest, own


def _hiding(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """Bias [1, H, 1, M] that hides keys [H, M]."""
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill(hidden, -math.inf)[None, :, None]


def _size(x: Tensor) -> Tensor:
    """Frobenius norm of [H, N, D], [H]."""
    return torch.linalg.vector_norm(x, dim=(-2, -1), dtype=attend.exact_dtype(x.dtype))
