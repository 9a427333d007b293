"""Named tables of areas: who may look at whom when several subjects, or several scenes, share a video."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import or_

import torch
from torch import Tensor

from control.address import Area, Found, Side, inside
from control.bias import BiasTable
from control.strength import Strength
from probe.call import AttentionCall
from probe.errors import UsageError
from probe.region import Region, padding, text, video
from probe.site import Progress, Where

_LAMIC = {
    "subject": "=11=0=",
    "words": "111ss1",
    "padding": "111111",
    "region": "=s1+s=",
    "rest": "0s1s10",
    "reference": "=11=0=",
}
"""Who sees whom, columns in the order of the rows: 1 yes, 0 no, = the same subject, s from the second stage on, + the
same subject, from the second stage on all.
"""


@dataclass(frozen=True)
class Subject:
    """One subject of a layout: the text about it, the region of the video it belongs in and, where the sequence has
    one, its reference.
    """

    text: Area
    region: Area
    reference: Area | None = None


def lamic(
    subjects: Sequence[Subject], *, switch: float = 0.05, where: Where | None = None, strength: Strength = 1.0
) -> tuple[BiasTable, BiasTable]:
    """LAMIC's group isolation and region modulation (arXiv 2508.00477): one table for the share `switch` of the steps,
    then another, which lets regions and the rest of the video meet.

    For each subject i its text T_i, region R_i and reference F_i; W, the other words; P, padding; U, the rest of the
    video. 1 sees, 0 does not, = within the same subject, s from the second stage on, + the same subject, and from the
    second stage on all:

        rows   T_j  W  P  R_j  U  F_j
        T_i     =   1  1   =   0   =
        W       1   1  1   s   s   1
        P       1   1  1   1   1   1
        R_i     =   s  1   +   s   =
        U       0   s  1   s   1   0
        F_i     =   1  1   =   0   =

    A token in several areas sees what any of them sees. The authors use it without training in all layers of
    FLUX-Kontext, whose references are images in the sequence; here a reference is an area of the video, such as frames.
    The unconditional half shows no words: there all text is padding, and the regions are kept apart all the same,
    unless `where` chooses branches (FLUX has no such half).

    Raises:
        UsageError: no subject, more than fit a table, or a `where` with steps, which the stages set.
    """
    where = where or Where()
    if not subjects or where.steps is not None:
        raise UsageError(
            f"LAMIC must have subjects, and sets its steps by `switch`. Got {len(subjects)} subjects and steps "
            f"{where.steps}. Leave the steps out."
        )
    groups = _lamic_groups(subjects)
    first, second = (
        BiasTable(
            [area for _, _, area in groups],
            [[_bias(_lamic_sees(row, column, stage)) for column in groups] for row in groups],
            where=replace(where, steps=steps),
            strength=strength,
            name=f"LAMIC stage {stage}",
        )
        for stage, steps in ((1, Progress(0, switch)), (2, Progress(switch, 1)))
    )
    return first, second


def mask2dit(scenes: Sequence[tuple[Area, Area]], *, where: Where | None = None, strength: Strength = 1.0) -> BiasTable:
    """Mask2DiT's segment table (arXiv 2503.19881) for `scenes` of (text area, video area).

    The text of a scene sees itself and its own video; the video of a scene sees its own text and all video, so that
    scenes stay of one piece. Text and video in no scene see all and are seen by all; a token of several scenes sees
    what any of them sees.

    The authors give each scene 226 text tokens of its own and fine-tune CogVideoX with the mask; here the texts are
    parts of one prompt, and what it does without training is not known. The unconditional half shows no words, and is
    left alone where texts are words.

    Raises:
        UsageError: no scene, or more than fit a table.
    """
    if not scenes:
        raise UsageError("Mask2DiT must have scenes. Got none. Give a text area and a video area for each.")
    groups = [(kind, scene) for kind in (0, 1) for scene in range(len(scenes))]

    def sees(row: tuple[int, int], column: tuple[int, int]) -> bool:
        return row[1] == column[1] or (row[0], column[0]) == (1, 1)

    return BiasTable(
        [scenes[scene][kind] for kind, scene in groups],
        [[_bias(sees(row, column)) for column in groups] for row in groups],
        where=where or Where(),
        strength=strength,
        name="Mask2DiT",
    )


@dataclass(frozen=True)
class Outside(Found):
    """The tokens of a region that lie in none of some areas."""

    region: Region
    areas: tuple[Area, ...]

    def inside(self, call: AttentionCall, entry: int, side: Side) -> Tensor:
        """bool, one per row or column."""
        taken = torch.stack([inside(area, call, entry, side) for area in self.areas]).any(0)
        return inside(self.region, call, entry, side) & ~taken

    def __str__(self) -> str:
        return f"{self.region} outside of {', '.join(map(str, self.areas))}"


_Group = tuple[str, int, Area]
"""A row of the table, its subject (-1 for none), and its area."""


def _lamic_groups(subjects: Sequence[Subject]) -> list[_Group]:
    texts, regions = tuple(one.text for one in subjects), tuple(one.region for one in subjects)
    references = [(i, one.reference) for i, one in enumerate(subjects) if one.reference is not None]
    return [
        *(("subject", i, area) for i, area in enumerate(texts)),
        ("words", -1, outside(text(), *texts)),
        ("padding", -1, padding()),
        *(("region", i, area) for i, area in enumerate(regions)),
        ("rest", -1, outside(video(), *regions, *(area for _, area in references))),
        *(("reference", i, area) for i, area in references),
    ]


def _lamic_sees(row: _Group, column: _Group, stage: int) -> bool:
    rule, same = _LAMIC[row[0]][list(_LAMIC).index(column[0])], row[1] == column[1]
    return {"1": True, "0": False, "=": same, "s": stage == 2, "+": same or stage == 2}[rule]


def outside(region: Region, *areas: Area) -> Area:
    """The tokens of a region in none of some areas; a region itself where these are."""
    known = [area for area in areas if isinstance(area, Region)]
    return region & ~reduce(or_, known) if len(known) == len(areas) else Outside(region, areas)


def _bias(sees: bool) -> float:
    return 0.0 if sees else -math.inf
