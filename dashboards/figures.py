"""Arrays to charts: no streamlit, no disk, no torch.

Colours: Cividis, readable by colour-blind people, from zero (not from the smallest value), so that zero looks like
zero. Arrays go to the browser as float32.
"""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from probe.errors import UsageError

ROWS = ("text", "padding", "video")
COLUMNS = ("text", "padding", "same frame", "other frames")
_SCALE = "Cividis"


def word_map(lift: NDArray[np.floating], title: str = "") -> go.Figure:
    """One heat map per token frame of a word map [F, Y, X] (lift, 1.0 = uniform), all on one scale from 0."""
    _check_axes(lift, 3, "[F, Y, X]")
    names = [f"frame {frame}" for frame in range(len(lift))]
    figure = make_subplots(1, len(lift), subplot_titles=names, horizontal_spacing=0.01)
    for frame, values in enumerate(lift.astype(np.float32)):
        heat = go.Heatmap(
            z=values, coloraxis="coloraxis", hovertemplate="row %{y}, column %{x}: %{z:.2f}<extra></extra>"
        )
        figure.add_trace(heat, 1, frame + 1)
    figure.update_yaxes(autorange="reversed", scaleanchor="x", showticklabels=False)
    figure.update_xaxes(showticklabels=False)
    return figure.update_layout(title=title, coloraxis=_axis("lift", float(lift.max())))


def region_mass(table: NDArray[np.floating], title: str = "") -> go.Figure:
    """Where the attention of text, padding and video rows goes: mass [3, 4] as numbers on heat, rows sum to 1."""
    _check_axes(table, 2, "[3, 4]")
    text = [["–" if np.isnan(value) else f"{value:.1%}" for value in row] for row in table]
    heat = go.Heatmap(
        z=table.astype(np.float32),
        x=[f"on {name}" for name in COLUMNS],
        y=[f"{name} rows" for name in ROWS],
        text=text,
        texttemplate="%{text}",
        coloraxis="coloraxis",
        hovertemplate="%{y} %{x}: %{text}<extra></extra>",
    )
    figure = go.Figure(heat).update_yaxes(autorange="reversed")
    return figure.update_layout(title=title, coloraxis=_axis("mass", 1.0))


def layers_by_heads(grid: NDArray[np.floating], quantity: str, title: str = "") -> go.Figure:
    """One number per layer and head, [L, H], layers downwards."""
    _check_axes(grid, 2, "[L, H]")
    heat = go.Heatmap(
        z=grid.astype(np.float32),
        coloraxis="coloraxis",
        hovertemplate="layer %{y}, head %{x}: %{z:.3f}<extra></extra>",
    )
    figure = (
        go.Figure(heat).update_yaxes(autorange="reversed", title="layer", dtick=1).update_xaxes(title="head", dtick=1)
    )
    return figure.update_layout(title=title, coloraxis=_axis(quantity, float(np.nanmax(grid))))


def _axis(name: str, peak: float) -> dict[str, object]:
    return {"colorscale": _SCALE, "cmin": 0, "cmax": peak or 1.0, "colorbar": {"title": name}}


def _check_axes(array: NDArray[np.floating], axes: int, shape: str) -> None:
    if np.ndim(array) != axes:
        raise UsageError(
            f"A figure must be drawn from an array {shape}. Got {np.shape(array)}. Choose one layer, head or step."
        )
