"""Perturbed attention for guidance away from it: PAG and its kin, SEG, region masks.

Each is an edit for the perturbed pass: give it `where=Where(branches=Which(role="perturbed"))`, and heads if only some
are meant. A region is two letters, of the rows and of the columns: t text (padding included), v video; vt are video
rows on text columns. Strength 0 changes nothing, 1 is the whole perturbation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from control.address import inside
from control.closed_form import Identity, Sharpest, Uniform, Within
from control.edit import Edit
from control.fork import Fork
from control.variant import head_place, picked, places
from control.weighting import Weighting, by_table
from probe import attend, region
from probe.call import AttentionCall
from probe.change import Change
from probe.errors import UsageError
from probe.layout import TokenLayout
from probe.site import JOINT

Over = Literal["video", "text", "all"]
Quarter = Literal["tt", "tv", "vt", "vv"]

_AREAS = {"t": ~region.video(), "v": region.video()}
_POOLS = {"video": _AREAS["v"], "text": _AREAS["t"], "all": _AREAS["t"] | _AREAS["v"]}


def identity_attention(rows: Literal["video", "all"] = "video", **address: Any) -> Fork:
    """Perturbed attention guidance (arXiv 2403.17377), in the two forms in use, which differ.

    "video": the logits of video rows on other video tokens are hidden; text columns stay visible to them, text rows are
    as ever: O_i = a_i v_i + (1 - a_i) softmax(L_i,text) V_text with a_i = sigmoid(L_ii - lse_i,text), as in diffusers'
    PAG of SD3. Costs the text columns only. "all": O = V in the whole sequence, text rows too, as HeadHunter and
    diffusers' guider do it; it takes the context from the text rows. Costs nothing.

    Strength u gives SoftPAG, O <- (1 - u) O + u O_identity, which is the same blend of the maps.

    Raises:
        UsageError: other rows.
    """
    if rows not in ("video", "all"):
        raise UsageError(f"Identity attention must be of video or all rows. Got {rows!r}. Choose one of them.")
    if rows == "all":
        return Fork(Identity(), **address)
    return Fork(Identity(beside=_AREAS["t"]), rows=_AREAS["v"], **address)


def video_mass_to_self(**address: Any) -> Fork:
    """Video rows keep their probabilities on text and put all that they have on the video on themselves: O_i =
    m_i v_i + sum_text P_ij v_j, m_i the video mass. Text rows are as ever. Unlike hidden logits this keeps the mass of
    the text.
    """
    return Fork(Within(Identity(), _AREAS["v"]), rows=_AREAS["v"], **address)


def uniform_attention(**address: Any) -> Fork:
    """Every row, text rows and cross attention too unless `rows` and `where` say otherwise, gives the mean of the
    values of all visible keys.
    """
    return Fork(Uniform(), **address)


def sharpest_attention(**address: Any) -> Fork:
    """Every row, text rows and cross attention too unless `rows` and `where` say otherwise, gives the value of the key
    with its largest logit.
    """
    return Fork(Sharpest(), **address)


@dataclass(eq=False)
class BlurQuery(Edit):
    """Smoothed energy guidance (SEG, arXiv 2408.00760): queries are replaced by their Gaussian blur over the grid.

    `sigma` is in tokens, one number or one each for t, y and x; infinite, it is the mean over that axis, 0 leaves the
    axis alone. The weights of the blur are renormalised at the borders. `over`: the tokens that are blurred and
    changed; "text" (padding included, hidden text excluded) and "all" have no grid and take the mean, so that sigma
    must be infinite. Strength s: q <- (1 - s) q + s blur(q). Costs no attention.

    q is blurred as it is attended, after QK-norm and RoPE; with `unturned` it is turned back, blurred and turned
    again, so that each query keeps its position and only its content is blurred (no difference without RoPE).
    diffusers' SEG blurs the projection before norm and RoPE, takes the first floor(sqrt(N))^2 tokens for a square
    image, and has its branches swapped: a sigma above its threshold for "infinite" runs the Gaussian, one below takes
    the mean.

    Raises:
        UsageError: a sigma that is negative or not of one or three numbers, or finite where there is no grid.
    """

    sigma: float | tuple[float, float, float] = math.inf
    over: Over = "video"
    unturned: bool = field(default=False, kw_only=True)
    rank = 2
    touches = frozenset({"q"})
    kinds: frozenset[str] | None = field(default=JOINT | {"self"}, init=False)

    def __post_init__(self) -> None:
        given = self.sigma if isinstance(self.sigma, tuple) else (self.sigma,) * 3
        if len(given) != 3 or not all(one >= 0 for one in given):
            raise UsageError(f"A blur must have one sigma >= 0, or three. Got {self.sigma}. Give tokens along t, y, x.")
        if self.over not in get_args(Over) or (self.over != "video" and set(given) != {math.inf}):
            raise UsageError(
                f"A blur must be over the video, or infinite over text or all. Got sigma {self.sigma} over "
                f"{self.over!r}. Leave sigma out for the mean."
            )
        self.sigmas = given

    def __str__(self) -> str:
        return f"BlurQuery({self.over}, sigma {self.sigma})"

    def extent(self, call: AttentionCall, row: int) -> Tensor:
        """bool [N]: the rows it changes."""
        return inside(self.rows, call, row) & self._pool(call, row)

    def apply(self, call: AttentionCall, entry: int, amount: float) -> None:
        """Replace the queries of one batch entry."""
        heads, q = head_place(call, self.heads(call)), call.q[entry]
        exact = q[heads].to(attend.exact_dtype(q.dtype))
        pool, content = self._pool(call, entry), self._turned(exact, call, -1)
        blurred = content.clone()
        if self.over == "video":
            blurred[:, pool] = self._blur(content[:, pool], call.rows)
        elif pool.any():
            blurred[:, pool] = content[:, pool].mean(1, keepdim=True)
        rows = places(self.extent(call, entry))
        mixed = torch.lerp(exact[:, rows], self._turned(blurred, call, 1)[:, rows], amount)
        call.writable("q")[entry][picked(heads, rows)] = mixed.to(q.dtype)

    def _pool(self, call: AttentionCall, entry: int) -> Tensor:
        return inside(_POOLS[self.over], call, entry)

    def _turned(self, q: Tensor, call: AttentionCall, way: int) -> Tensor:
        """q [h, N, D] without its rotation (way -1), or with it again (1)."""
        if not self.unturned or call.rope is None:
            return q
        video, turned = call.rows.video_slice, q.clone()
        turned[:, video] = call.rope.turn(q[:, video], way * call.rope.positions(call.rows), self.heads(call))
        return turned

    def _blur(self, q: Tensor, rows: TokenLayout) -> Tensor:
        """Along each axis of the grid; q [h, N_video, D]."""
        cells = q.unflatten(1, rows.grid.shape)
        for axis, sigma in enumerate(self.sigmas):
            if sigma:
                weights = _gaussian(cells.shape[1 + axis], sigma).to(q.device, q.dtype)
                cells = (weights @ cells.movedim(1 + axis, -2)).movedim(-2, 1 + axis)
        return cells.flatten(1, 3)


@dataclass(eq=False)
class MaskRegion(Weighting):
    """One quarter of the joint map is taken away. "renormalise": its logits are hidden and the rows keep unit sum;
    "zero": its probabilities are 0 and the rows lose that mass.

    The other rows and columns are as ever; `rows` narrows the rows further. Strength s multiplies exp(logit) or the
    probability by 1 - s.

    Raises:
        UsageError: an unknown region or mode.
        PlanError: (when served) rows are left without a key.
    """

    quarter: Quarter
    mode: Literal["renormalise", "zero"] = "renormalise"
    kinds = JOINT

    def __post_init__(self) -> None:
        if self.quarter not in get_args(Quarter) or self.mode not in ("renormalise", "zero"):
            raise UsageError(
                f"A region mask must take away tt, tv, vt or vv, by renormalise or zero. Got {self.quarter!r} by "
                f"{self.mode!r}. The first letter is of the rows."
            )

    def __str__(self) -> str:
        return f"MaskRegion({self.quarter}, {self.mode})"

    def changes(self, call: AttentionCall, entry: int, amount: float) -> tuple[Change, ...]:
        """Two groups of rows, two of columns.

        Raises:
            UsageError: a strength outside 0 to 1.
            PlanError: a row would see no key.
        """
        if not 0 <= amount <= 1:
            raise UsageError(f"The strength of {self} must lie in 0 to 1. Got {amount:g}. 1 takes all of it away.")
        rows = inside(self.rows, call, entry) & inside(_AREAS[self.quarter[0]], call, entry)
        columns = inside(_AREAS[self.quarter[1]], call, entry, "columns")
        kept = torch.ones(2, 2, device=call.q.device)
        kept[1, 1] = 1 - amount
        denominator = torch.ones_like(kept) if self.mode == "zero" else None
        return by_table(self, call, entry, rows.long(), columns.long(), kept, denominator)


def _gaussian(size: int, sigma: float) -> Tensor:
    """Weights [size, size], float64, of the columns in each row; sum to one."""
    at = torch.arange(size, dtype=torch.float64)
    return torch.softmax(-((at[:, None] - at) ** 2) / (2 * sigma**2), -1)
