"""Locality: how far video tokens look, in time and in space."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from probe import attend, measure
from probe.entry import Entry, on_device
from probe.errors import UsageError
from probe.layout import TokenLayout
from probe.readout.base import Readout
from probe.readout.column import SINK_MASS, TAU, TEXT_MASS
from probe.readout.kept import Tube
from probe.readout.mass import same_frame
from probe.site import JOINT

AXES = ("frame", "vertical", "horizontal")
BANDS = ("spatial", "temporal", "text")

_DEFINITIONS = {
    "spatial_mass": "mass of the video rows on their own frame, 0 to 1",
    "temporal_mass": "mass of the video rows on their own position +-{radius} in other frames, 0 to 1",
    "text_mass": TEXT_MASS,
    "spatial_uniform": "spatial_mass if attention were uniform, 0 to 1",
    "temporal_uniform": "temporal_mass if attention were uniform, 0 to 1",
    "text_uniform": "text_mass if attention were uniform, 0 to 1",
    "sink_mass": SINK_MASS,
    "frame_distance": "E|df| of the video rows, conditional on the video, in token frames",
    "vertical_distance": "E|dy| of the video rows, conditional on the video, in patches",
    "horizontal_distance": "E|dx| of the video rows, conditional on the video, in patches",
    "spatial_distance": "E|dy| + E|dx|, conditional on the video, in patches",
    "frame_distance_normalised": "frame_distance over that of uniform attention, 1 = uniform, NaN for one frame",
    "spatial_distance_normalised": "spatial_distance over that of uniform attention, 1 = uniform",
    "frame_spread": "standard deviation of |df|, conditional on the video, in token frames",
    "spatial_rms": "sqrt(E[dy^2 + dx^2]), conditional on the video, in patches",
    "frame_radius": "least r with 90 % of the video mass within |df| <= r, in token frames",
    "vertical_radius": "least r with 90 % of the video mass within |dy| <= r, in patches",
    "horizontal_radius": "least r with 90 % of the video mass within |dx| <= r, in patches",
}


@dataclass(eq=False, kw_only=True)
class Locality(Readout):
    """Where video rows look: distances on each axis, and masses of bands with the share that is uniform beside them.

    After a run `values[at]` is a dict of float32 arrays:
    - `frame` [H, F, F], `vertical` [H, Y, Y], `horizontal` [H, X, X]: from a place (row) to a place (column) of one
      axis, the mean over the video rows at a place of the probability that falls on a place, conditional on the video.
      Rows sum to one. Distances, squares and radii are sums over such a table, so they are exact;
    - `bands` [H, 3]: mass of the video rows, joint over all keys, on BANDS: their own frame; their own position, plus
      and minus `radius` patches, in other frames; the text (padding included). `uniform` [H, 3]: the same if attention
      were uniform;
    - `sink` [H]: mass on sink columns (more than 10 times their uniform share; see `probe.readout.column`).

    `probe.measure.head_class` takes the masses. Extra work: for the tables one call of the video per D of their F + Y +
    X places (one-hot places in place of V), one swapped call, and thin products. Errors: masses 1e-5 in float32, 2e-4
    in half precision; tables 1e-5, 2e-3 in half precision. Source: the identity sum_j p_ij f_j for any f in place of V;
    spatial and temporal heads of Sparse VideoGen (Xi et al. 2025, arXiv 2502.01776).

    Raises:
        UsageError: a negative radius.
    """

    radius: int = 1

    kinds = JOINT | {"self"}

    def __post_init__(self) -> None:
        if self.radius < 0:
            raise UsageError(f"The radius of a band must be 0 or more. Got {self.radius}. 0 is the own position alone.")
        super().__post_init__()

    @property
    def definitions(self) -> dict[str, str]:
        """What each of the metrics is."""
        return {name: text.replace("{radius}", str(self.radius)) for name, text in _DEFINITIONS.items()}

    def reduce(self, entry: Entry) -> dict[str, Tensor]:
        """See the class."""
        video, columns = entry.rows.video_slice, entry.video_columns
        spatial, temporal = same_frame(entry)[:, video], Tube(self.radius, own=False).mass(entry)
        bands = [spatial.mean(1), temporal.mean(1), columns[:, entry.columns.text_slice].sum(1)]
        uniform = on_device(_uniform(entry.columns, self.radius), torch.float32, columns.device)
        return _tables(entry) | {
            "bands": torch.stack(bands, 1),
            "uniform": uniform.expand(len(columns), -1),
            "sink": (columns * (columns * entry.keys > TAU)).sum(1),
        }

    def cost(self, layout: TokenLayout) -> float:
        """The tables at a head width of 64, the swapped call, one frame and the tube."""
        tables = -(-sum(layout.grid.shape) // 64) * (layout.grid.size / layout.total) ** 2
        return tables + 1.0 + layout.grid.patches / layout.total + Tube(self.radius).share(layout)

    def metrics(self, value: Any) -> dict[str, NDArray[np.float32]]:
        """See `definitions`."""
        found = {f"{band}_mass": value["bands"][:, i] for i, band in enumerate(BANDS)}
        found |= {f"{band}_uniform": value["uniform"][:, i] for i, band in enumerate(BANDS)}
        found |= {"sink_mass": value["sink"]} | _distances({axis: value[axis] for axis in AXES})
        return {name: np.asarray(found[name], np.float32) for name in _DEFINITIONS}


def _tables(entry: Entry) -> dict[str, Tensor]:
    """[H, n, n] by axis. A group of D places at a time goes through the attention as one-hot values."""
    q, k = entry.q[:, entry.rows.video_slice], entry.k[:, entry.columns.video_slice]
    heads, _, width = q.shape
    sizes = entry.columns.grid.shape
    index = torch.cartesian_prod(*(torch.arange(size, device=q.device) for size in sizes))
    places = torch.cat([F.one_hot(at, size) for at, size in zip(index.mT, sizes, strict=True)], 1).to(q.dtype)
    parts = []
    for group in places.split(width, 1):
        values = F.pad(group, (0, width - group.shape[1])).expand(1, heads, -1, -1)
        out = attend.partial(q[None], k[None], values, entry.scale).out[0, ..., : group.shape[1]].unflatten(1, sizes)
        parts.append([out.mean(rest, dtype=entry.lse.dtype) for rest in ((2, 3), (1, 3), (1, 2))])
    joined = (torch.cat(side, -1).split(sizes, -1) for side in zip(*parts, strict=True))
    return {axis: side[i] for i, (axis, side) in enumerate(zip(AXES, joined, strict=True))}


def _uniform(layout: TokenLayout, radius: int) -> tuple[float, ...]:
    """Mean share of keys in each of BANDS, over the video rows."""
    frames, *sizes = layout.grid.shape
    near = np.prod([(np.abs(np.subtract.outer(range(n), range(n))) <= radius).sum(1).mean() for n in sizes])
    return tuple(count / layout.total for count in (layout.grid.patches, (frames - 1) * float(near), layout.text))


def _distances(tables: dict[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float64]]:
    """What the tables [H, n, n] say about distances, by name, [H] each."""
    seen = {axis: _profile(table) for axis, table in tables.items()}
    even = {axis: _profile(np.full_like(table, 1 / table.shape[-1])) for axis, table in tables.items()}
    mean, uniform = ({axis: _moment(profile, 1) for axis, profile in side.items()} for side in (seen, even))
    square = {axis: _moment(profile, 2) for axis, profile in seen.items()}
    spatial, anywhere = (side["vertical"] + side["horizontal"] for side in (mean, uniform))
    return {
        **{f"{axis}_distance": distance for axis, distance in mean.items()},
        **{f"{axis}_radius": (profile.cumsum(-1) < 0.9 - 1e-6).sum(-1) for axis, profile in seen.items()},
        "spatial_distance": spatial,
        "frame_distance_normalised": _over(mean["frame"], uniform["frame"]),
        "spatial_distance_normalised": _over(spatial, anywhere),
        "frame_spread": np.sqrt(np.maximum(square["frame"] - mean["frame"] ** 2, 0)),
        "spatial_rms": np.sqrt(square["vertical"] + square["horizontal"]),
    }


def _profile(table: NDArray[np.float32]) -> NDArray[np.float64]:
    """Mass at each distance 0 to n - 1 of a table [H, n, n], [H, n], summing to one."""
    n = table.shape[-1]
    pairs = np.array([n, *(2 * (n - d) for d in range(1, n))])
    profile = measure.distance_profile(table.astype(float)) * pairs
    return profile / profile.sum(-1, keepdims=True)


def _moment(profile: NDArray[np.float64], power: int) -> NDArray[np.float64]:
    return profile @ np.arange(profile.shape[-1], dtype=float) ** power


def _over(top: NDArray[np.float64], bottom: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.divide(top, bottom, where=bottom > 0, out=np.full_like(top, np.nan))
