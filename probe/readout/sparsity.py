"""Sparsity: how few keys hold most of a row, from sampled rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from probe import attend, region
from probe.entry import Entry, index_of, on_device
from probe.errors import UsageError
from probe.layout import TokenLayout
from probe.readout.base import Readout
from probe.readout.sample import OfHead, draw, map_rows, stratified, video_rows

ROWS = ("video", "text")
DROPPED = (50, 80, 90, 95)
"""Sparsity in percent: the share of keys, or of blocks of keys, that a row goes without."""
WANTED = (90, 95, 99)
"""Mass in percent that a row should keep."""
QUANTITIES = (
    *(f"kept_mass_{s}" for s in DROPPED),
    *(f"needed_keys_{t}" for t in WANTED),
    "above_threshold",
    *(f"block_recall_{s}" for s in DROPPED),
)
_WORK = 7.0  # measured on a CPU


@dataclass(eq=False, kw_only=True)
class Sparsity(Readout):
    """Means over rows of what a row i of N keys gives to its strongest ones, s in DROPPED and t in WANTED percent:

    - `kept_mass_s`: mass of its ceil((1 - s) N) largest p_ij, 1 - s to 1; uniform attention has 1 - s;
    - `needed_keys_t`: least number of keys that hold mass t, over N, 1 / N to 1;
    - `above_threshold`: share of keys with p_ij > `eps` / N, 0 to 1;
    - `block_recall_s`: mass of the row on the blocks that mean-pooled attention chooses. Rows and keys are cut in the
      order of the sequence into blocks of `block` tokens, the last one shorter; with C blocks of keys, a block of rows
      keeps the ceil((1 - s) C) of largest logit between its mean query and their mean keys, and all its rows with it.

    They need whole rows, so `rows` of every frame are drawn (all if a frame has no more), and of the real text tokens
    at most `text_rows` (0 leaves the text out, and needs no prompt), the same at every call with one `seed`.

    After a run `values[at]` is a dict of float32 [H, 2, 12], ROWS x QUANTITIES: `mean`, and `half_width` of its 95 %
    interval over the draw, 0 where all rows were there; see `probe.readout.sample.stratified`. NaN without text rows.
    Errors of a row itself: 1e-5 in float32 and 2e-4 in half precision for masses, a key more or less for counts.
    Source: top-k and threshold sparsity as in methods of sparse attention, for example AdaSpa (arXiv 2502.21079); the
    blocks as in DraftAttention (arXiv 2505.14708), with blocks of the sequence and one budget for every block of rows.

    Raises:
        UsageError: fewer than two rows a frame, or a block, eps or text_rows that make no sense.
    """

    rows: int = 64
    text_rows: int = 256
    block: int = 64
    eps: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rows < 2 or self.block < 1 or self.eps <= 0 or self.text_rows < 0 or self.text_rows == 1:
            raise UsageError(
                "Sparsity must have rows >= 2, block >= 1, eps > 0, and text_rows 0 or >= 2. Got "
                f"{self.rows}, {self.block}, {self.eps} and {self.text_rows}. Leave them out for 64 rows a frame."
            )
        super().__post_init__()

    @property
    def definitions(self) -> dict[str, str]:
        """What each of the metrics is; all are means over the video rows, 0 to 1."""
        chosen = f"blocks of {self.block} that mean-pooled attention chooses"
        return {
            **{f"kept_mass_{s}": f"mass of the {100 - s} % largest weights of a video row, 0 to 1" for s in DROPPED},
            **{f"needed_keys_{t}": f"share of keys that hold {t} % of a video row, 0 to 1" for t in WANTED},
            "above_threshold": f"share of keys with a weight above {self.eps:g} / N in a video row, 0 to 1",
            **{f"block_recall_{s}": f"mass of a video row on the {100 - s} % of {chosen}, 0 to 1" for s in DROPPED},
            **{f"{name}_half_width": f"half-width of the 95 % interval of {name} over the draw" for name in QUANTITIES},
        }

    def reduce(self, entry: Entry) -> dict[str, Tensor]:
        """`mean` and `half_width` [H, 2, 12]."""
        video = video_rows(entry.rows, self.rows, self.seed)
        text, every = self._text(entry)
        rows = on_device((*video.ravel().tolist(), *text), torch.long, entry.q.device)
        blocks = _pooled_choice(entry, self.block)

        def of(part: Tensor) -> OfHead:
            kept = blocks[:, :, part // self.block]
            return lambda head, p: self._of_rows(p, kept[:, head])

        values = map_rows(entry, rows, of)
        seen, said = values[:, : video.size].unflatten(1, video.shape), values[:, None, video.size :]
        parts = [stratified(seen, entry.rows.grid.patches), stratified(said, every)]
        mean, half = (torch.stack(side, 1) for side in zip(*parts, strict=True))
        return {"mean": mean, "half_width": half}

    def cost(self, layout: TokenLayout) -> float:
        """The sampled rows, of which each is worth about seven of a fused attention: they are sorted and summed up."""
        return _WORK * (min(self.rows, layout.grid.patches) * layout.grid.frames + self.text_rows) / layout.total

    def metrics(self, value: Any) -> dict[str, NDArray[np.float32]]:
        """See `definitions`; of the video rows."""
        means = {name: value["mean"][:, 0, i] for i, name in enumerate(QUANTITIES)}
        return means | {f"{name}_half_width": value["half_width"][:, 0, i] for i, name in enumerate(QUANTITIES)}

    def _text(self, entry: Entry) -> tuple[list[int], int]:
        """The drawn rows of real text tokens, and how many there are of those."""
        if not self.text_rows or not entry.rows.text:
            return [], 0
        every = region.text().indices(entry.rows, entry.prompt)
        return every[draw(1, len(every), self.text_rows, self.seed)[0]].tolist(), len(every)

    def _of_rows(self, p: Tensor, kept: Tensor) -> Tensor:
        """QUANTITIES of rows p [r, N], [r, 12]; `kept` [4, r, C] are the blocks each row keeps."""
        keys = p.shape[-1]
        above = (p > self.eps / keys).to(p.dtype).mean(-1)
        blocks = F.pad(p, (0, -keys % self.block)).unflatten(-1, (-1, self.block)).sum(-1)
        recall = [(blocks * chosen).sum(-1) for chosen in kept]
        mass = _strongest_first(p).cumsum(-1)
        top = mass[:, index_of([_remaining(keys, s) - 1 for s in DROPPED], p.device)]
        wanted = on_device(WANTED, mass.dtype, mass.device).div(100).repeat(len(p), 1)
        needed = (torch.searchsorted(mass, wanted) + 1).clamp_max(keys) / keys
        return torch.cat([top, needed, torch.stack([above, *recall], -1)], -1).to(p.dtype)


def _strongest_first(p: Tensor) -> Tensor:
    """Each row of p in descending order. On a CPU numpy sorts 10 times as fast as torch."""
    if p.device.type != "cpu":
        return p.sort(-1, descending=True).values
    return torch.from_numpy(np.sort(p.detach().numpy(), -1)).flip(-1)


def _remaining(count: int, dropped: int) -> int:
    """ceil((1 - dropped %) count), in whole numbers."""
    return -(-count * (100 - dropped) // 100)


def _pooled_choice(entry: Entry, block: int) -> Tensor:
    """bool [4, H, A, C]: the blocks of keys that each block of rows keeps at each of DROPPED."""
    logits = _pool(entry.q, block) @ _pool(entry.k, block).mT
    order = torch.sort(logits, stable=True, dim=-1, descending=True).indices
    count = logits.shape[-1]
    rank = torch.empty_like(order).scatter_(-1, order, torch.arange(count, device=order.device).expand_as(order))
    return torch.stack([rank < _remaining(count, s) for s in DROPPED])


def _pool(x: Tensor, block: int) -> Tensor:
    """Means of [H, N, D] over blocks of tokens, [H, ceil(N / block), D], in float32 at least."""
    return torch.stack([part.mean(1, dtype=attend.exact_dtype(x.dtype)) for part in x.split(block, 1)], 1)
