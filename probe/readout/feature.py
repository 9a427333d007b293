"""Token tensors as features: their principal components, and which token of one frame is which of another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from probe import attend
from probe.call import AttentionCall
from probe.entry import Entry, index_of
from probe.errors import UsageError
from probe.layout import TokenLayout
from probe.plan import Stage
from probe.readout.base import Readout
from probe.site import JOINT, Where

Feature = Literal["q", "k", "v", "o"]
Source = Literal["p", "q", "k", "v", "o"]


class TokenReadout(Readout):
    """A readout of the tokens of one tensor: q, k, v, or o, the attention output of each head before the projection
    that follows. `p` stands for the attention map itself.
    """

    needs_lse = False

    def __init__(self, tensor: str, known: tuple[str, ...], where: Where | None, stage: Stage) -> None:
        self.source = tensor
        if tensor not in known:
            raise UsageError(f"A tensor to look at must be one of {', '.join(known)}. Got {tensor!r}. Choose another.")
        if tensor == "o" and stage == Stage.BEFORE:
            raise UsageError(
                "A readout of the attention output must look after the attention. Got stage BEFORE. Use stage USED."
            )
        if tensor in ("p", "k", "v"):
            self.kinds = JOINT | {"self"}  # cross attention has no video among its keys
        self.call: AttentionCall | None = None
        super().__init__(where or Where(), stage)

    def serve(self, call: AttentionCall, rows: tuple[int, ...]) -> None:
        """Reduce each entry of `rows` while the outputs of the call are at hand."""
        with self.looking_at(call):
            super().serve(call, rows)

    @contextmanager
    def looking_at(self, call: AttentionCall) -> Iterator[None]:
        """Its outputs are at hand."""
        self.call = call
        try:
            yield
        finally:
            self.call = None

    def tokens(self, entry: Entry) -> Tensor:
        """[H, tokens, D] of the chosen heads, in at least float32."""
        if self.source == "o":
            assert self.call is not None
            assert self.call.out is not None
            out = self.call.out[self.call.branches.index(entry.branch)]
            made = out[index_of(entry.heads, entry.q.device), : entry.rows.total]
        else:
            made = getattr(entry, self.source)
        return made.to(attend.exact_dtype(made.dtype))

    def video(self, entry: Entry, per_head: bool) -> Tensor:
        """The video tokens [H, video, D], or [1, video, H D]."""
        side = entry.columns if self.source in ("k", "v") else entry.rows
        return by_head(self.tokens(entry)[:, side.video_slice], per_head)


def by_head(tokens: Tensor, per_head: bool) -> Tensor:
    """[H, tokens, D] as it is, or with its heads side by side, as the model joins them: [1, tokens, H D]."""
    return tokens if per_head else tokens.transpose(0, 1).flatten(1)[None]


class Features(TokenReadout):
    """Principal components of a tensor over all video tokens of all frames together: what tells its tokens apart.

    `tensor` is q, k, v (after normalisation and RoPE) or o. `per_head` fits each head by itself, else the heads stand
    side by side as one feature. The sign of a component is such that its largest weight is positive; components of
    nearly equal variance may mix.

    After a run `values[at]` is a dict of float32: "projection" [heads or 1, F, Y, X, C], in the tensor's unit, mean 0;
    "axes" [heads or 1, C, D], of length 1; "explained" [heads or 1, C], each component's share of the variance, 0 to 1,
    largest first (NaN if all tokens are equal). `rgb` makes a picture of the first three.

    Source: principal component analysis, by the eigenvectors of the D x D covariance in float64: exact up to the
    rounding of the tensor itself. The cost, video tokens times D squared, is not predicted.
    """

    def __init__(
        self,
        tensor: Feature = "k",
        components: int = 3,
        per_head: bool = False,
        where: Where | None = None,
        stage: Stage = Stage.USED,
    ) -> None:
        self.components, self.per_head = components, per_head
        if components < 1:
            raise UsageError(f"Principal components must be at least 1. Got {components}. Ask for 3 to see colours.")
        super().__init__(tensor, get_args(Feature), where, stage)

    def __str__(self) -> str:
        return f"Features({self.source})"

    @property
    def definitions(self) -> dict[str, str]:
        """What each of the metrics is."""
        said = (
            f"share of the variance of {self.source} of the video in its {self.components} principal components, 0 to 1"
        )
        return {f"explained_variance_{self.source}": said} if self.per_head else {}

    def reduce(self, entry: Entry) -> dict[str, Tensor]:
        """projection, axes, explained."""
        tokens = self.video(entry, self.per_head)
        if self.components > tokens.shape[-1]:
            raise UsageError(
                f"Principal components must be 1 to {tokens.shape[-1]}, the width of {self.source}. Got "
                f"{self.components}. Ask for fewer."
            )
        projection, axes, explained = principal(tokens, self.components)
        grid = entry.rows.grid.shape
        return {"projection": projection.unflatten(1, grid), "axes": axes, "explained": explained}

    def metrics(self, value: Any) -> dict[str, NDArray[np.float32]]:
        """The explained variance [H] if heads are apart; see `definitions`."""
        return {name: value["explained"].sum(-1) for name in self.definitions}

    @staticmethod
    def rgb(value: dict[str, NDArray[np.float32]]) -> NDArray[np.float32]:
        """The first three components as colours [heads or 1, F, Y, X, 3], each 0 to 1 from its least to its largest
        value over all frames.

        Raises:
            UsageError: fewer than three were kept.
        """
        three = value["projection"][..., :3]
        if three.shape[-1] < 3:
            raise UsageError(f"Colours must have 3 components. Got {three.shape[-1]}. Keep 3 with components=3.")
        low, high = (edge(three, (1, 2, 3), keepdims=True) for edge in (np.min, np.max))
        return (three - low) / np.where(high > low, high - low, 1)


class Correspondence(TokenReadout):
    """Which token of frame g each token of frame f belongs to, and whether the way back leads home.

    `frames` are (f, g), token frames from 0. With `tensor` p the score of a pair is the attention of f conditional on
    frame g (and of g conditional on f for the way back); with q, k, v or o it is the cosine of the two tokens, the same
    both ways. `per_head` keeps heads apart; else p is the mean over heads, and features stand side by side.

    After a run `values[at]` is a dict: "match" int64 [heads or 1, Y, X, 2], row and column of the largest score in
    frame g (the first of equal ones); "returns" bool [heads or 1, Y, X], whether the match of the match lies within
    `radius` rows and columns of the start; and for p "expected" float32 [heads or 1, Y, X, 2], the mean row and column
    under p. Error of "expected": 1e-4 patches, in half precision too; scores closer than their rounding may swap.
    Memory: two P x P matrices per head, P patches of a frame (CogVideoX-2B: 15 MB a head).

    Source: nearest neighbours of diffusion features, as in DIFT (Tang et al. 2023), with the forward-backward check of
    optical flow (Kalal et al. 2010); attention between two frames, as in DiTFlow (Pondaven et al. 2025).
    """

    def __init__(
        self,
        frames: tuple[int, int],
        tensor: Source = "p",
        radius: int = 1,
        per_head: bool = False,
        where: Where | None = None,
        stage: Stage = Stage.USED,
    ) -> None:
        self.frames, self.radius, self.per_head = frames, radius, per_head
        if len(frames) != 2 or frames[0] == frames[1] or min(frames) < 0:
            raise UsageError(f"Frames to match must be two different ones from 0. Got {frames}. Name two frames.")
        super().__init__(tensor, get_args(Source), where, stage)

    def __str__(self) -> str:
        return f"Correspondence({self.source}, frames {self.frames[0]} and {self.frames[1]})"

    @property
    def definitions(self) -> dict[str, str]:
        """What each of the metrics is."""
        f, g = self.frames
        which = f"of frame {f} whose match by {self.source} in frame {g}"
        said = {
            "returning": f"share of the patches {which} leads back to within {self.radius} patches, 0 to 1",
            "displacement": f"mean distance between the patches of frame {f} and their match by {self.source} in frame "
            f"{g}, in patches",
        }
        return {f"{name}_{self.source}_{f}_{g}": text for name, text in said.items()} if self.per_head else {}

    def reduce(self, entry: Entry) -> dict[str, Tensor]:
        """match, returns and, for p, expected."""
        there, back = self._scores(entry)
        forth, home = there.argmax(-1), back.argmax(-1)
        height, width = entry.rows.grid.shape[1:]
        place = torch.cartesian_prod(*(torch.arange(size, device=forth.device) for size in (height, width)))
        gap = (place[home.gather(1, forth)] - place).abs().amax(-1)
        made = {"match": place[forth], "returns": gap <= self.radius}
        if self.source == "p":
            made["expected"] = there @ place.to(there.dtype)
        return {name: values.unflatten(1, (height, width)) for name, values in made.items()}

    def cost(self, layout: TokenLayout) -> float:
        """Two blocks of the matrix with their log-normalisers, or one product of features."""
        return (3.0 if self.source == "p" else 0.5) * (layout.grid.patches / layout.total) ** 2

    def metrics(self, value: Any) -> dict[str, NDArray[np.float32]]:
        """Share that returns and mean displacement [H] if heads are apart; see `definitions`."""
        moved = value["match"] - np.stack(np.indices(value["match"].shape[1:3]), -1)
        tables = value["returns"], np.hypot(moved[..., 0], moved[..., 1])
        means = (table.mean((1, 2), dtype=np.float32) for table in tables)
        return dict(zip(self.definitions, means, strict=True)) if self.per_head else {}

    def _scores(self, entry: Entry) -> tuple[Tensor, Tensor]:
        """Scores [heads or 1, P, P] of f against g, and of g against f."""
        f, g = (entry.rows.frame_slice(frame) for frame in self.frames)
        if self.source == "p":
            pair = (entry.weights(rows, columns, within=columns) for rows, columns in ((f, g), (g, f)))
            there, back = (p.div_(p.sum(-1, keepdim=True)) for p in pair)  # the rounding of their lse cancels
            return (there, back) if self.per_head else (there.mean(0, keepdim=True), back.mean(0, keepdim=True))
        tokens = F.normalize(self.video(entry, self.per_head), dim=-1).unflatten(1, (entry.rows.grid.frames, -1))
        scores = tokens[:, self.frames[0]] @ tokens[:, self.frames[1]].mT
        return scores, scores.mT


def principal(tokens: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Principal components of tokens [H, N, D]: projections [H, N, count], axes [H, count, D], shares of variance [H,
    count].
    """
    centred = tokens.double() - tokens.double().mean(1, keepdim=True)
    variances, vectors = torch.linalg.eigh(centred.mT @ centred)
    axes = vectors.mT.flip(1)[:, :count]
    largest = axes.gather(-1, axes.abs().argmax(-1, keepdim=True))
    axes, variances = axes * largest.sign(), variances.clamp_min(0).flip(-1)
    return centred @ axes.mT, axes, variances[:, :count] / variances.sum(-1, keepdim=True)
