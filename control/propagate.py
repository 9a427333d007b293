"""Maps of words carried along by the attention among the video tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from probe.entry import Entry, expected


def propagated(entry: Entry, maps: Tensor, times: int, power: float) -> Tensor:
    """A^times maps^power of maps [n, F, Y, X], for A the mean over heads of the attention among the video tokens of an
    entry (AttenCraft, arXiv 2405.17965). The largest power is divided out, as it outgrows half precision.
    """
    top = maps.amax().clamp_min(torch.finfo(maps.dtype).tiny)
    flat = (maps.flatten(1) / top) ** power
    for _ in range(times):
        values = torch.zeros_like(entry.k)
        values[..., : len(flat)] = flat.mT
        mixed = expected(entry.q[:, entry.rows.video_slice], entry.k, values, entry.scale).out
        flat = mixed[..., : len(flat)].mean(0).mT
    return flat.view_as(maps).to(maps.dtype) * top**power
