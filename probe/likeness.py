"""Similarity of two attention maps over the same keys, row by row, without forming either.

With logits L, p_ij = exp(L_ij - lse_i), and the logits of both maps added by channels, [q_A | q_B] [k_A | k_B]^T =
L_A + L_B: one attention of twice the head width.

- bhattacharyya: sum_j sqrt(p^A_ij p^B_ij) = exp(lse((L_A + L_B) / 2) - (lse_A + lse_B) / 2), 0 to 1, 1 = equal.
- cosine: <p^A_i, p^B_i> / (|p^A_i| |p^B_i|) = exp(lse(L_A + L_B) - (lse(2 L_A) + lse(2 L_B)) / 2), 0 to 1, 1 = equal.
- kl: sum_j p^A_ij log(p^A_ij / p^B_ij) = scale (q^A_i E_A[k^A] - q^B_i E_A[k^B]) - lse_A + lse_B, the expectations
  under p^A_i; nats, 0 = equal, no upper bound, not symmetric.

Source: these identities.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from probe import attend
from probe.entry import expected
from probe.errors import LayoutError, UsageError
from probe.layout import TokenLayout

Measure = Literal["bhattacharyya", "cosine", "kl"]
Keys = Literal["all", "video"]
MEASURES: tuple[Measure, ...] = get_args(Measure)
ROWS = ("video", "text")


class Map(NamedTuple):
    """An attention map as what makes it: q [H, N, D], k [H, M, D] and lse [H, N]."""

    q: Tensor
    k: Tensor
    lse: Tensor


def similarity(
    a: Mapping[str, ArrayLike | Tensor],
    b: Mapping[str, ArrayLike | Tensor],
    layout: TokenLayout,
    scale: float | None = None,
    measures: Sequence[Measure] = MEASURES,
    keys: Keys = "all",
) -> dict[str, NDArray[np.float32]]:
    """Similarity of two kept maps: of runs, steps, layers or prompts, as `Similarity` measures it in a call.

    `a` and `b` are values of `KeepQK`: q [H, N, D] and k [H, M, D], numpy or torch; `layout` names the rows. `scale` is
    that of the logits, 1 / sqrt(D) if left out. Returns measure -> float32 [H, 2], means over video and text rows.
    Computed in float32 (float64 for float64).

    Raises:
        UsageError: an unknown measure, or tensors of different shapes.
        LayoutError: the layout has another number of rows.
    """
    tensors = [_tensor(kept[name]) for kept in (a, b) for name in ("q", "k")]
    shapes = [tuple(x.shape) for x in tensors]
    if shapes[:2] != shapes[2:]:
        raise UsageError(
            f"Compared Q and K must have the same shapes. Got {shapes[0]} and {shapes[1]}, {shapes[2]} and "
            f"{shapes[3]}. Keep maps of one model, one size and one number of text tokens."
        )
    measures = known(measures, keys)
    if shapes[0][1] != layout.total or (keys == "video" and shapes[1][1] != layout.total):
        raise LayoutError(
            f"A layout must have the {shapes[0][1]} rows of the maps, and their {shapes[1][1]} columns to choose the "
            f"video. Got {layout.total}. Use the layout of the run."
        )
    part = layout.video_slice if keys == "video" else slice(None)
    q_a, k_a, q_b, k_b = (x[:, part] for x in tensors)
    scale = attend.scale_of(q_a, scale)
    one, two = Map(q_a, k_a, _lse(q_a, k_a, scale)), Map(q_b, k_b, _lse(q_b, k_b, scale))
    made = means(row_similarity(one, two, scale, measures), layout.with_text(0) if keys == "video" else layout)
    return {name: values.float().cpu().numpy() for name, values in made.items()}


def row_similarity(a: Map, b: Map, scale: float, measures: Sequence[Measure] = MEASURES) -> dict[str, Tensor]:
    """measure -> [H, N], one value per row of two maps over the same keys, as this module defines them."""
    own = {"bhattacharyya": _bhattacharyya, "cosine": _cosine, "kl": _kl}
    return {measure: own[measure](a, b, scale) for measure in measures}


def means(rows: Mapping[str, Tensor], layout: TokenLayout) -> dict[str, Tensor]:
    """Means [H, 2] over the video rows and the text rows; NaN where there are none."""
    parts = layout.video_slice, layout.text_slice
    return {name: torch.stack([values[:, part].mean(1) for part in parts], 1) for name, values in rows.items()}


def known(measures: Sequence[Measure], keys: Keys) -> tuple[Measure, ...]:
    """The measures, each once.

    Raises:
        UsageError: an unknown measure, none, or unknown keys.
    """
    unknown = sorted(set(measures) - set(MEASURES))
    if unknown or not measures:
        raise UsageError(
            f"Measures of similarity must be some of {', '.join(MEASURES)}. Got {unknown or 'none'}. Name at least one."
        )
    if keys not in get_args(Keys):
        raise UsageError(f"Keys to compare over must be all or video. Got {keys!r}. Choose one of them.")
    return tuple(dict.fromkeys(measures))


def _bhattacharyya(a: Map, b: Map, scale: float) -> Tensor:
    return torch.exp(_joint(a, b, scale / 2) - (a.lse + b.lse) / 2).clamp_max(1)


def _cosine(a: Map, b: Map, scale: float) -> Tensor:
    norms = (_lse(a.q, a.k, 2 * scale) + _lse(b.q, b.k, 2 * scale)) / 2
    return torch.exp(_joint(a, b, scale) - norms).clamp_max(1)


def _kl(a: Map, b: Map, scale: float) -> Tensor:
    logits = (a.q * expected(a.q, a.k, a.k, scale).out).sum(-1) - (b.q * expected(a.q, a.k, b.k, scale).out).sum(-1)
    return (scale * logits - a.lse + b.lse).clamp_min(0)


def _joint(a: Map, b: Map, scale: float) -> Tensor:
    """lse of scale * (q_A k_A + q_B k_B), [H, N]."""
    return _lse(torch.cat([a.q, b.q], -1), torch.cat([a.k, b.k], -1), scale)


def _lse(q: Tensor, k: Tensor, scale: float) -> Tensor:
    return attend.partial(q[None], k[None], k[None], scale).lse[0]


def _tensor(values: Any) -> Tensor:
    tensor = torch.as_tensor(values)
    return tensor.to(attend.exact_dtype(tensor.dtype))
