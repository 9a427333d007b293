"""Region mass: how the attention of text, padding and video rows is shared among text, padding, its own frame and
other frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from probe import attend, region
from probe.call import AttentionCall
from probe.layout import TokenLayout
from probe.plan import Handler, Stage
from probe.readout.word import conditional
from probe.site import Branch, Where
from probe.word import Prompt

ROWS = ("text", "padding", "video")
COLUMNS = ("text", "padding", "video_same_frame", "video_other_frames")


@dataclass(eq=False)
class RegionMass(Handler):
    """`mass(R, C)`: mean over rows of R of the probability that falls on columns C. Each row sums to one.

    Rows and columns are ROWS x COLUMNS. Text rows have no frame of their own: all their video mass counts as other
    frames. A row group without tokens (a prompt that fills the whole text length has no padding) is NaN. Same-frame
    mass is exact by one small attention per frame (exp(lse_S - lse) is the mass of a key set S); other
    frames are the remainder.

    After a run `masses[(step, branch, layer)]` is float32 [H, 3, 4]. Conditional branches only.
    """

    where: Where = field(default_factory=Where)
    stage = Stage.USED
    needs_lse = True

    def __post_init__(self) -> None:
        self.where = conditional(self.where)
        self.begin((), 0, 0)

    def __str__(self) -> str:
        return "RegionMass"

    def begin(self, prompts: Sequence[Prompt], steps: int, layers: int) -> None:
        """Forget the last run."""
        self.masses: dict[tuple[int, Branch, int], NDArray[np.float32]] = {}

    def serve(self, call: AttentionCall, rows: tuple[int, ...]) -> None:
        """Reduce the call to one [H, 3, 4] table per branch in `rows`."""
        for row in rows:
            branch = call.branches[row]
            self.masses[call.site.step, branch, call.site.layer] = _table(call, row, self.where).float().cpu().numpy()

    def cost(self, layout: TokenLayout) -> float:
        """The text columns, and each frame against itself."""
        return layout.text / layout.total + layout.grid.size * layout.grid.patches / layout.total**2


def _table(call: AttentionCall, row: int, where: Where) -> Tensor:
    layout, heads = call.layout, list(where.head_list(call.q.shape[1]))
    prompt = call.prompt_of(call.branches[row])
    q, k, v = (x[row : row + 1, heads] for x in (call.q, call.k, call.v))
    lse = call.lse()[row : row + 1, heads]
    text, padding = (torch.from_numpy(r.mask(layout, prompt)).to(q.device) for r in (region.text(), region.padding()))
    columns = [attend.probabilities(q, k[..., inside, :], lse, call.scale).sum(-1)[0] for inside in (text, padding)]
    same = torch.zeros_like(columns[0])
    for frame in layout.frame_slices():
        part = attend.partial(q[..., frame, :], k[..., frame, :], v[..., frame, :], call.scale)
        same[:, frame] = attend.mass(part, lse[..., frame])[0]
    other = (1 - columns[0] - columns[1] - same).clamp_min(0)
    per_row = torch.stack([*columns, same, other], -1)  # [H, N, 4]
    groups = (text, padding, ~(text | padding))
    return torch.stack([per_row[:, inside].mean(1) for inside in groups], 1)
