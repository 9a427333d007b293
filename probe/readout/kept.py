"""Kept mass: how much of the attention a sparse pattern would keep, exactly."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from probe import attend
from probe.entry import Entry, index_of
from probe.errors import LayoutError, UsageError
from probe.layout import TokenLayout
from probe.plan import Stage
from probe.readout.base import Readout
from probe.readout.mass import same_frame
from probe.region import Region
from probe.site import JOINT, Where


class Pattern(ABC):
    """Which keys each video row keeps. `kinds` are the kinds of attention it makes sense in, None for any."""

    kinds: frozenset[str] | None = JOINT | {"self"}

    @abstractmethod
    def mass(self, entry: Entry) -> Tensor:
        """Probability each video row puts on the keys it keeps, [H, video], 0 to 1."""

    @abstractmethod
    def share(self, layout: TokenLayout) -> float:
        """Predicted work, as a share of the plain attention."""


@dataclass(frozen=True)
class Keys(Pattern):
    """The same keys for every row."""

    region: Region
    kinds = None

    def mass(self, entry: Entry) -> Tensor:
        prompt = entry.prompt if entry.columns.text and entry.branch.guided and entry.prompts else None
        columns = index_of(self.region.indices(entry.columns, prompt).tolist(), entry.q.device)
        return _mass(entry, columns, entry.rows.video_slice)

    def share(self, layout: TokenLayout) -> float:
        try:
            return float(self.region.mask(layout).mean())
        except LayoutError:  # words are only known with the prompt
            return 1.0

    def __str__(self) -> str:
        return str(self.region)


@dataclass(frozen=True)
class FrameWindow(Pattern):
    """Frames at a distance of at most `width` (0: its own), and the text if `text`."""

    width: int = 0
    text: bool = False

    def __post_init__(self) -> None:
        _refuse_negative("The width of a frame window", self.width)

    def mass(self, entry: Entry) -> Tensor:
        video = entry.rows.video_slice
        text = _mass(entry, entry.columns.text_slice, video) if self.text else 0
        return (self._frames(entry) + text).clamp_max(1)

    def _frames(self, entry: Entry) -> Tensor:
        if not self.width:
            return same_frame(entry)[:, entry.rows.video_slice]
        frames, count = list(entry.columns.frame_slices()), entry.columns.frames
        parts = []
        for index, rows in enumerate(entry.rows.frame_slices()):
            first, last = max(index - self.width, 0), min(index + self.width, count - 1)
            parts.append(_mass(entry, slice(frames[first].start, frames[last].stop), rows))
        return torch.cat(parts, 1)

    def share(self, layout: TokenLayout) -> float:
        keys = (2 * self.width + 1) * layout.grid.patches + self.text * layout.text
        return min(keys / layout.total, 1.0)

    def __str__(self) -> str:
        return f"frames within {self.width}{' and text' if self.text else ''}"


@dataclass(frozen=True)
class Tube(Pattern):
    """Its own position, plus and minus `radius` patches in height and width, in every frame; in frames other than its
    own if not `own`; and the text if `text`.
    """

    radius: int = 0
    text: bool = False
    own: bool = True

    def __post_init__(self) -> None:
        _refuse_negative("The radius of a tube", self.radius)

    def mass(self, entry: Entry) -> Tensor:
        text = _mass(entry, entry.columns.text_slice, entry.rows.video_slice) if self.text else 0
        return (torch.stack([self._tube(entry, head) for head in range(len(entry.q))]) + text).clamp_max(1)

    def share(self, layout: TokenLayout) -> float:
        return ((2 * self.radius + 1) ** 2 * layout.grid.frames + self.text * layout.text) / layout.total

    def _tube(self, entry: Entry, head: int) -> Tensor:
        """[video]: one thin product of frames by frames per offset and position."""
        shape = entry.columns.grid.shape
        q, lse = (_by_position(x[head, entry.rows.video_slice], shape) for x in (entry.q, entry.lse))
        k = _by_position(entry.k[head, entry.columns.video_slice], shape)
        mass = torch.zeros_like(lse)
        for down, right in product(_shifts(shape[1], self.radius), _shifts(shape[2], self.radius)):
            rows = _window(shape[1], down), _window(shape[2], right)
            keys = _window(shape[1], -down), _window(shape[2], -right)
            p = attend.probabilities(q[rows], k[keys], lse[rows], entry.scale)
            if not self.own:
                p.diagonal(dim1=-2, dim2=-1).zero_()
            mass[rows] += p.sum(-1)
        return mass.permute(2, 0, 1).flatten()

    def __str__(self) -> str:
        frames = "every frame" if self.own else "other frames"
        return f"position within {self.radius} in {frames}{' and text' if self.text else ''}"


@dataclass(frozen=True, eq=False)
class Blocks(Pattern):
    """Any pattern of blocks: `keep` bool [row blocks, key blocks], True = kept; rows and keys are cut into blocks of
    `size` tokens in the order of the sequence, the last one shorter.
    """

    keep: NDArray[np.bool_]
    size: int
    kinds = None

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UsageError(f"A block must hold 1 token or more. Got {self.size}. Sparse kernels use 64 or 128.")

    def mass(self, entry: Entry) -> Tensor:
        keep = self._fitted(entry.rows.total, entry.columns.total)
        video = np.arange(entry.rows.total)[entry.rows.video_slice]
        chosen, which = np.unique(keep[video // self.size], axis=0, return_inverse=True)
        mass = torch.zeros_like(entry.lse)
        for number, blocks in enumerate(chosen):
            columns = np.flatnonzero(blocks.repeat(self.size)[: entry.columns.total])
            rows = torch.from_numpy(video[which.reshape(-1) == number]).to(entry.q.device)
            mass[:, rows] = _mass(entry, torch.from_numpy(columns).to(entry.q.device), rows)
        return mass[:, entry.rows.video_slice]

    def share(self, layout: TokenLayout) -> float:
        return float(np.mean(self.keep))

    def _fitted(self, rows: int, columns: int) -> NDArray[np.bool_]:
        shape = -(-rows // self.size), -(-columns // self.size)
        if np.shape(self.keep) != shape:
            raise LayoutError(
                f"A block mask must be {shape[0]} x {shape[1]} for {rows} rows and {columns} keys in blocks of "
                f"{self.size}. Got {' x '.join(str(n) for n in np.shape(self.keep))}. Count the last, shorter block."
            )
        return np.asarray(self.keep, bool)

    def __str__(self) -> str:
        return f"blocks of {self.size}, {np.mean(self.keep):.0%} kept"


class KeptMass(Readout):
    """Probability that each video row puts on the keys a sparse pattern keeps, exp(lse_kept - lse), 0 to 1.

    `pattern` is a Region (the same keys for every row), or a FrameWindow, Tube or Blocks of this module. It is also the
    exact weight of the sparse output in the full one: O = m O_kept + (1 - m) O_dropped. Uniform attention keeps the
    share of keys. Metrics are named after `name`, or after the pattern.

    After a run `values[at]` is a dict: `mean` and `low` float32 [H], mean and 10th percentile (linear) over the video
    rows. Error: 1e-5 in float32, 2e-4 in half precision. Source: partial attention (FlashInfer's recursive attention);
    the patterns as in Sparse VideoGen (Xi et al. 2025, arXiv 2502.01776).

    Raises:
        UsageError: a negative width or radius, or blocks of no tokens.
        LayoutError: during the run, a region or block mask that does not fit the tokens.
    """

    def __init__(
        self, pattern: Region | Pattern, where: Where | None = None, name: str | None = None, stage: Stage = Stage.USED
    ) -> None:
        self.pattern = Keys(pattern) if isinstance(pattern, Region) else pattern
        self.name = name or re.sub(r"\W+", "_", str(self.pattern)).strip("_")
        self.kinds = self.pattern.kinds
        super().__init__(where or Where(), stage)

    def __str__(self) -> str:
        return f"KeptMass({self.pattern})"

    @property
    def definitions(self) -> dict[str, str]:
        """What each of the metrics is."""
        said = f"of the mass of a video row on its keys: {self.pattern}, 0 to 1"
        return {f"kept_mass_{self.name}": f"mean {said}", f"kept_mass_{self.name}_low": f"10th percentile {said}"}

    def reduce(self, entry: Entry) -> dict[str, Tensor]:
        """`mean` and `low` [H]."""
        mass = self.pattern.mass(entry)
        return {"mean": mass.mean(1), "low": mass.quantile(0.1, 1)}

    def cost(self, layout: TokenLayout) -> float:
        """The pairs that are kept."""
        return self.pattern.share(layout)

    def metrics(self, value: Any) -> dict[str, NDArray[np.float32]]:
        """See `definitions`."""
        return dict(zip(self.definitions, (value["mean"], value["low"]), strict=True))


def _mass(entry: Entry, columns: slice | Tensor, rows: slice | Tensor) -> Tensor:
    """Probability some rows put on some columns, [H, rows]."""
    return torch.exp(entry.part(columns, rows) - entry.lse[:, rows])


def _by_position(x: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Video tokens [F Y X, ...] as [Y, X, F, ...]."""
    return x.unflatten(0, shape).movedim(0, 2)


def _shifts(size: int, radius: int) -> range:
    """The shifts of an axis by at most `radius` that leave something on it."""
    reach = min(radius, size - 1)
    return range(-reach, reach + 1)


def _window(size: int, shift: int) -> slice:
    """The places i of an axis for which i + shift lies on it too."""
    return slice(max(-shift, 0), size - max(shift, 0))


def _refuse_negative(thing: str, value: int) -> None:
    if value < 0:
        raise UsageError(f"{thing} must be 0 or more. Got {value}. Use 0 for the token's own place alone.")
