"""What the contract of the families is measured with: a pipeline and its plain run, the calls of a traced run, and
float64 matrices of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

import probe
from probe.call import AttentionCall
from probe.models.family import Family
from probe.models.registry import family_of
from probe.plan import Handler, Stage
from probe.readout.base import At
from probe.site import JOINT
from tests.toys import Case
from tests.toys.stock import StockCall, followed

STEPS = 2


class Bench(NamedTuple):
    """A pipeline, the latents and calls of its plain run, and how many forwards a step has."""

    case: Case
    pipe: Any
    plain: Tensor
    turns: int
    calls: list[StockCall]

    def latents(self, *handlers: Handler, **call: Any) -> Tensor:
        """Of the stock call, traced if there are handlers."""
        pipe = probe.trace(self.pipe, *handlers) if handlers else self.pipe
        return self.case.toy.latents(pipe, **{"steps": STEPS, **call})

    @property
    def models(self) -> list[Any]:
        """One transformer, or two."""
        both = (self.pipe.transformer, getattr(self.pipe, "transformer_2", None))
        return [model for model in both if model is not None]

    @property
    def family(self) -> Family:
        return family_of(self.pipe.transformer)

    def kind_of(self, call: StockCall) -> str:
        """The kind of a stock call."""
        nth = 0 if self.family.ragged else call.nth
        slots = self.family.slots(self.pipe.transformer)
        return next(slot.kind for slot in slots if (slot.layer, slot.call) == (call.layer, nth))

    def word_maps(self, *words: str) -> probe.WordMaps:
        """In both directions where text and video attend together."""
        directions = ("vt", "tv") if self.family.kinds & JOINT else ("vt",)
        return probe.WordMaps(*words, directions=directions, per_head=True)


def bench_of(case: Case) -> Bench:
    """A case at work: it runs twice, first to count the forwards."""
    pipe = case.pipeline()
    with followed(pipe, 1) as calls:
        case.toy.latents(pipe, steps=STEPS)
    turns = (calls[-1].step + 1) // STEPS
    with followed(pipe, turns) as calls:
        plain = case.toy.latents(pipe, steps=STEPS)
    return Bench(case, pipe, plain, turns, calls)


@dataclass(eq=False)
class Keep(Handler):
    """Keeps every call."""

    where: probe.Where = field(default_factory=probe.Where)
    stage = Stage.USED

    def begin(self, prompts: Any, steps: int, layers: int) -> None:
        self.calls: list[AttentionCall] = []
        self.prompts = prompts

    def serve(self, call: AttentionCall, rows: tuple[int, ...]) -> None:
        self.calls.append(call)

    def found(self, at: At) -> tuple[AttentionCall, int]:
        """The call a value was read from, and the batch entry in it."""
        for call in self.calls:
            here = (call.site.step, call.site.turn, call.site.layer, call.site.kind)
            if here == (at.step, at.turn, at.layer, at.kind) and at.branch in call.branches:
                return call, call.branches.index(at.branch)
        raise LookupError(at)


def matrix(call: AttentionCall, row: int) -> Tensor:
    """float64 [H, N, M] over the keys that the model's mask lets through; the hidden ones stand at the end."""
    logits = call.q[row].double() @ call.k[row].double().mT * call.q.shape[-1] ** -0.5
    if call.mask is not None:
        logits = logits[..., call.mask[row, 0, 0]]
    return logits.softmax(-1)


def starts(call: AttentionCall) -> tuple[int, int, int]:
    """Where the text rows, the text columns and the video columns of a call begin; -1 if it has none."""
    size, first = call.layout.grid.size, call.layout.order == "text-video"
    if call.site.kind == "cross":
        return -1, 0, -1
    return (0, 0, call.layout.text) if first else (size, size, 0)


def slow_mass(call: AttentionCall, row: int, padding: tuple[bool, ...]) -> np.ndarray:
    """Region masses [H, 3, 4] of the matrix, by the names of its rows and columns."""
    p, grid, cross = matrix(call, row).numpy(), call.layout.grid, call.site.kind == "cross"
    frames = [f"frame {i // grid.patches}" for i in range(grid.size)]
    words = ["padding" if pad else "text" for pad in padding][: call.layout.text]
    both = words + frames if call.layout.order == "text-video" else frames + words
    columns = np.array(words if cross else both[: p.shape[-1]])
    rows = np.array(frames) if cross else columns
    video = np.char.startswith(columns, "frame")[None]
    table = np.full((len(p), 3, 4), np.nan)
    for r, name in enumerate(("text", "padding", "frame")):
        inside = [i for i, kind in enumerate(rows) if kind.startswith(name)]
        same = columns[None] == rows[inside, None]
        parts = (columns[None] == "text", columns[None] == "padding", same & video, ~same & video)
        if inside:
            table[:, r] = np.stack([(p[:, inside] * part).sum(-1).mean(-1) for part in parts], -1)
    return table
