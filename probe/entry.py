"""One batch entry of an attention call, and the exact reductions readouts are made of. No N x N matrix is formed.

Shapes: q [H, N, D]; k, v [H, M, D]; a reduction over keys gives [H, N, ...], one over rows [H, M, ...].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from probe import attend, region
from probe.errors import PlanError, WordError
from probe.layout import TokenLayout
from probe.site import Branch, Site
from probe.transpose import column_sums
from probe.word import Prompt

Place = slice | Tensor
Index = Place | Sequence[int]


@dataclass(eq=False)
class Entry:
    """What one branch attends to in one call: p_ij = exp(scale q_i k_j - lse_i), over the keys it may see.

    `rows` and `columns` name the tokens of queries and keys. Properties are computed once, whoever asks.

    Where edits changed the weights, the last `extra` channels of q and k carry what the logits gained; those of v are
    0. Unless `whole`, rows need not sum to one: added keys have a share, factors are raw, or a row sees nothing, which
    has lse inf.
    """

    site: Site
    branch: Branch
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    rows: TokenLayout
    columns: TokenLayout
    prompts: tuple[Prompt, ...]
    heads: tuple[int, ...]
    given_lse: Tensor | None = None
    given_shares: Tensor | None = None
    extra: int = 0
    whole: bool = True

    @property
    def keys(self) -> int:
        """Keys of the softmax."""
        return self.columns.total

    @property
    def lse(self) -> Tensor:
        """Row log-normaliser, natural log [H, N], float32 (float64 for float64)."""
        return self._expected.lse if self.given_lse is None else self.given_lse

    @cached_property
    def prompt(self) -> Prompt:
        """The prompt this branch shows, as long as the text of the call.

        Raises:
            WordError: the run was told no prompts, or the branch is unconditional: it does not show the prompt.
        """
        if not self.branch.guided:
            raise WordError(
                f"A readout of words or padding must look at conditional branches. Got {self.branch}. Use "
                "Which(guided=True), or leave branches out."
            )
        if self.branch.nearest >= len(self.prompts):
            raise WordError(
                f"A readout of words or padding must know the prompt. Got a run that was told {len(self.prompts)}. "
                "Pass prompt=..., or prompts to run()."
            )
        return self.prompts[self.branch.nearest].first(max(self.rows.text, self.columns.text))

    @cached_property
    def groups(self) -> dict[str, Place]:
        """Where the rows of text, padding and video are; text and padding need the prompt."""
        return self._kinds(self.rows)

    @cached_property
    def column_groups(self) -> dict[str, Place]:
        """Where the columns of text, padding and video are."""
        return self.groups if self.columns == self.rows else self._kinds(self.columns)

    @cached_property
    def shares(self) -> Tensor:
        """Probability each row puts on each part of the columns, [H, N, parts]: frames in order, then text (padding
        included) if there is any; sums to one where the row does.

        In single and double precision one attention with the parts as one-hot values; in half precision, which would
        round these, one small attention per part.
        """
        if self.given_shares is not None:
            return self.given_shares
        parts = self.columns.parts()
        if self.q.dtype != attend.exact_dtype(self.q.dtype) or len(parts) > self.k.shape[-1]:
            return torch.stack([torch.exp(self.part(part) - self.lse) for part in parts], -1)
        places = torch.zeros_like(self.k)
        for index, part in enumerate(parts):
            places[:, part, index] = 1
        return self.attend(places)[..., : len(parts)]

    @property
    def has_shares(self) -> bool:
        """Whether `shares` is there without further work."""
        return self.given_shares is not None or "shares" in vars(self)

    @cached_property
    def mean_key(self) -> Tensor:
        """Expected key of each row, sum_j p_ij k_j, [H, N, D], in the dtype of `lse`: one attention with K in place of
        V. The plain mean of the keys stays out of that attention, so that half precision rounds deviations only.

        Raises:
            PlanError: the rows need not sum to one.
        """
        if not self.whole:
            raise PlanError(
                f"An expectation must be over rows that sum to one. Got raw, hidden or added keys at {self.site} for "
                f"{self.branch}. Read the model's own attention with stage=Stage.BEFORE."
            )
        return self._expected.out

    @cached_property
    def row_sums(self) -> Tensor:
        """What each row gives to these keys altogether, [H, N]: 1 but where rows are not whole."""
        return torch.ones_like(self.lse) if self.whole else torch.exp(self.part(slice(None)) - self.lse)

    @property
    def within_video(self) -> Entry:
        """The same rows on the video keys alone: all its probabilities are conditional on the video."""
        return self._video_alone if self.columns.text else self

    @cached_property
    def video_columns(self) -> Tensor:
        """Mean over the video rows of p_ij, [H, M]."""
        return self.column_means(self.rows.video_slice)

    def column_means(self, rows: Place) -> Tensor:
        """Mean over some rows of p_ij, [H, M], by one swapped call; NaN over none."""
        q, lse = self.q[:, rows], self.lse[:, rows]
        return column_sums(q, self.k, lse, self.scale) / lse.shape[1]

    def attend(self, values: Tensor) -> Tensor:
        """Expected value of each row, sum_j p_ij values_j, [H, N, D]; values [H, M, D]."""
        width = values.shape[-1]
        wide = F.pad(values, (0, self.q.shape[-1] - width))
        out, lse = attend.partial(self.q[None], self.k[None], wide[None], self.scale)
        made = out[0, ..., :width]
        return made if self.whole else (made * torch.exp(lse[0] - self.lse).unsqueeze(-1)).to(made.dtype)

    def weights(self, rows: Index = slice(None), columns: Index = slice(None), within: Index | None = None) -> Tensor:
        """p_ij of a few rows or a few columns, [H, rows, columns]: a thin product.

        `within` are the keys the softmax is conditional on, all of them by default.
        """
        rows, columns = self._place(rows), self._place(columns)
        lse = self.lse[:, rows] if within is None else self.part(within, rows)
        return attend.probabilities(self.q[:, rows], self.k[:, columns], lse, self.scale)

    def part(self, columns: Index, rows: Index = slice(None), sharpness: float = 1.0) -> Tensor:
        """Log-normaliser of some rows over some columns, [H, rows]; `exp(part - lse)` is their probability.

        `sharpness` multiplies the logits.
        """
        rows, columns = self._place(rows), self._place(columns)
        q, k, v = self.q[:, rows], self.k[:, columns], self.v[:, columns]
        return attend.partial(q[None], k[None], v[None], self.scale * sharpness).lse[0]

    @cached_property
    def _video_alone(self) -> Entry:
        video = self.columns.video_slice
        inside = {"k": self.k[:, video], "v": self.v[:, video], "columns": self.columns.with_text(0)}
        return replace(self, **inside, given_lse=None, given_shares=None, whole=True)

    @cached_property
    def _expected(self) -> attend.State:
        return expected(self.q, self.k, self.k, self.scale)

    def _kinds(self, side: TokenLayout) -> dict[str, Place]:
        if not side.text:
            return {"text": slice(0, 0), "padding": slice(0, 0), "video": side.video_slice}
        text, padding = (index_of(positions, self.q.device) for positions in _text_places(side, self.prompt))
        return {"text": text, "padding": padding, "video": side.video_slice}

    def _place(self, index: Index) -> Place:
        return index if isinstance(index, slice | Tensor) else index_of(index, self.q.device)


@lru_cache(maxsize=256)
def _text_places(side: TokenLayout, prompt: Prompt) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Positions of real text and of padding."""
    text, padding = (kind.indices(side, prompt).tolist() for kind in (region.text(), region.padding()))
    return tuple(text), tuple(padding)


def expected(q: Tensor, k: Tensor, values: Tensor, scale: float) -> attend.State:
    """Expected value of each row sum_j p_ij values_j [H, N, D], and lse [H, N], both in the dtype of lse.

    The plain mean of the values stays out of the attention, so that half precision rounds deviations only.
    """
    centre = values.to(attend.exact_dtype(values.dtype)).mean(1, keepdim=True)
    out, lse = attend.partial(q[None], k[None], (values - centre).to(values.dtype)[None], scale)
    return attend.State(centre + out[0], lse[0])


def index_of(positions: Sequence[int], device: torch.device) -> Place:
    """Positions as an index: a slice where one follows the other, else a tensor that is copied to the device once."""
    start = positions[0] if positions else 0
    if tuple(positions) == tuple(range(start, start + len(positions))):
        return slice(start, start + len(positions))
    return on_device(tuple(positions), torch.long, device)


@lru_cache(maxsize=256)
def on_device(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers as a tensor that stays on the device: copying them anew at every call would make it wait."""
    with torch.inference_mode(False):
        return torch.tensor(numbers, dtype=dtype, device=device)
