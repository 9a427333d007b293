"""Where the rows of a source land in a target: region by region, by a mapping, and with the rotation of which place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor

from control.address import Area, Gate, Side, gate_of, inside
from control.bank import Given
from probe.call import AttentionCall
from probe.errors import PlanError, UsageError
from probe.layout import Grid, TokenLayout

Numbers = Tensor | NDArray | Sequence[int]
"""For each video token of a target the one of its source, counted from 0 in the order of the grid; -1: its own."""


class Partners(NamedTuple):
    """For each video token of a target the video token of its source, long [N_video], and how much of it is taken,
    [N_video] in [0, 1]. `text`: text tokens are taken too, each from the one at its place.
    """

    index: Tensor
    weight: Tensor
    text: bool


def side_of(name: str) -> Side:
    """What the tokens of a tensor are in a call."""
    return "columns" if name in "kv" else "rows"


def partners_of(mapping: Tensor | Callable[[Tensor], Tensor], call: AttentionCall, theirs: Grid) -> Partners:
    """A mapping given as numbers, [N_video] or of the shape of the grid, or as a function of long [N_video]; `theirs`
    is the grid of the source.

    Raises:
        UsageError: not one number per video token, or a token that the source does not have.
    """
    size, device = call.layout.grid.size, call.q.device
    index = mapping.reshape(-1) if isinstance(mapping, Tensor) else mapping(torch.arange(size, device=device))
    most = int(index.max()) if len(index) else -1
    if len(index) != size or most >= theirs.size:
        raise UsageError(
            f"A mapping must have one number per video token, {size}, from -1 to {theirs.size - 1}. Got {len(index)} "
            f"up to {most}. Give the token of the source for each, or -1."
        )
    index = index.to(device, torch.long)
    return Partners(index.clamp_min(0), (index >= 0).to(call.q.dtype), text=True)


def weight_of(
    rows: Area | None, gate: Gate | None, partners: Partners | None, call: AttentionCall, entry: int, name: str
) -> Tensor | None:
    """How much of the source each token of a tensor takes, [N] in [0, 1]; None if all take all of it."""
    if rows is None and gate is None and partners is None:
        return None
    side = side_of(name)
    layout: TokenLayout = getattr(call, side)
    weight = inside(rows, call, entry, side).to(call.q.dtype)
    if gate is not None:
        weight = weight * gate_of(gate, call, entry, side)
    if partners is not None:
        taken = torch.full_like(weight, float(partners.text))
        if layout.video:
            taken[layout.video_slice] = partners.weight
        weight = weight * taken
    return weight


def placed(
    name: str, given: Given, partners: Partners | None, call: AttentionCall, heads: tuple[int, ...], turn: bool = False
) -> Tensor:
    """A tensor of the source with its rows where they land, [h, N, D]. `turn`: what moves gets the rotation of the
    place where it lands.

    Raises:
        PlanError: `turn` where the model does not rotate q and k.
    """
    mine: TokenLayout = getattr(call, side_of(name))
    theirs, tensor = given.layout(name), given.take(name, heads)
    if mine == theirs and (partners is None or not mine.video):
        return tensor
    text = theirs.text_slice.start + torch.arange(mine.text, device=tensor.device)
    index = torch.zeros(mine.total, dtype=torch.long, device=tensor.device)
    index[mine.text_slice] = text.clamp_max(theirs.total - 1)
    video = torch.arange(mine.total - mine.text, device=tensor.device) if partners is None else partners.index
    if mine.video:
        index[mine.video_slice] = theirs.video_slice.start + video
    tensor = tensor[:, index]
    if turn and partners is not None and mine.video and name in "qk":
        moved = tensor[:, mine.video_slice]
        tensor[:, mine.video_slice] = _turned(moved, heads, mine.grid, theirs.grid, partners, call)
    return tensor


def refuse_misfit(
    name: str, given: Given, partners: Partners | None, weight: Tensor | None, call: AttentionCall, entry: int
) -> None:
    """Refuse rows that have no counterpart: video of another grid without a mapping, and text that not both have.

    Raises:
        PlanError: there are such rows; names both sites.
    """
    mine: TokenLayout = getattr(call, side_of(name))
    theirs = given.layout(name)
    there = f"{given.branch} at {given.site} for {call.branches[entry]} at {call.site}"
    if mine.video and partners is None and mine.grid != theirs.grid:
        raise PlanError(
            f"A source must have the grid of its target. Got {theirs.grid} for {mine.grid}: {there}. Give both videos "
            "one size, or a mapping."
        )
    visible = call.columns.total if call.visible is None else call.visible[entry]
    fits = mine.text == theirs.text and (name not in "kv" or visible == given.visible)
    shown = min(_shown(call.columns, visible), _shown(given.columns, given.visible))
    if not fits and mine.text and (weight is None or bool(weight[mine.text_slice][shown:].any())):
        raise PlanError(
            f"Text rows must be such as both prompts have, where padding is hidden or left out. Got {given.visible} "
            f"visible keys for {visible}: {there}. Make the prompts equally long, or transfer rows=video() or the "
            "rows of words that both have at the same place."
        )


def _shown(columns: TokenLayout, visible: int) -> int:
    """Text tokens that may be seen."""
    return columns.text - (columns.total - visible)


def coordinates(grid: Grid, tokens: Tensor) -> Tensor:
    """(frame, y, x) of video tokens, long [n, 3]."""
    rest = tokens % grid.patches
    return torch.stack([tokens // grid.patches, rest // grid.width, rest % grid.width], -1)


def _turned(
    tensor: Tensor, heads: tuple[int, ...], mine: Grid, theirs: Grid, partners: Partners, call: AttentionCall
) -> Tensor:
    if call.rope is None:
        raise PlanError(
            "Queries and keys can be turned to another place only where the model rotates them. Got none at "
            f"{call.site}. Leave positions at 'source'."
        )
    here = coordinates(mine, torch.arange(mine.size, device=tensor.device))
    return call.rope.turn(tensor, (here - coordinates(theirs, partners.index)).float(), heads)
