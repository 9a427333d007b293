"""One attention call on seeded tensors, and its whole matrix: what readouts are checked on."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from probe.call import AttentionCall
from probe.layout import Grid, Order, TokenLayout
from probe.readout.base import Readout
from probe.site import Branch, Site
from probe.word import Prompt

TEXT = "a red cat runs left"
GRID = Grid(3, 2, 4)

JOINT: list[dict[str, Any]] = [{}, {"order": "video-text"}, {"order": "video-text", "visible": 29}]
"""Joint calls: the text first, last, and last with its padding hidden by the model's mask."""
SELF: list[dict[str, Any]] = [{"kind": "self"}]
CROSS: list[dict[str, Any]] = [{"kind": "cross"}, {"kind": "cross", "order": "video-text"}]


def prompt_of(tokens: int, pads: int) -> Prompt:
    """The words of TEXT, one token each, then ends of `tokens - pads` real tokens, then padding."""
    starts = np.cumsum([0, *(len(word) + 1 for word in TEXT.split())])
    words = [(word, (int(at), int(at) + len(word))) for word, at in zip(TEXT.split(), starts, strict=False)]
    real = (words + [("</s>", (0, 0))] * tokens)[: tokens - pads]
    pieces, spans = zip(*real, *[("<pad>", (0, 0))] * pads, strict=True)
    return Prompt(TEXT, pieces, tuple(range(tokens)), spans, tuple(i >= tokens - pads for i in range(tokens)))


def one_call(
    dtype: torch.dtype = torch.float32,
    order: Order = "text-video",
    text: int = 7,
    grid: Grid = GRID,
    heads: int = 2,
    dim: int = 16,
    kind: str = "joint",
    visible: int | None = None,
    pads: int = 2,
    seed: int = 0,
    sharp: float = 2.0,
) -> AttentionCall:
    """One guided batch entry; q, k, v lie in memory as [B, N, H, D], and the logits have deviation `sharp`.

    `visible` keys are seen, the first ones; the model's mask hides the rest.
    """
    layout = TokenLayout(order, text, grid)
    rows = grid.size if kind in ("self", "cross") else layout.total
    keys = {"self": grid.size, "cross": text}.get(kind, layout.total)
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(1, n, heads, dim, generator=generator, dtype=torch.float64) for n in (rows, keys, keys)]
    q, k, v = ((x * factor).to(dtype).transpose(1, 2) for x, factor in zip(made, (sharp, 1, 1), strict=True))
    hidden = None if visible is None else (torch.arange(keys) < visible)[None, None, None]
    return AttentionCall(
        site=Site(0, 0, 0, 0, kind),
        q=q,
        k=k,
        v=v,
        scale=None,
        layout=layout,
        branches=(Branch(),),
        prompts=(prompt_of(text, pads),) if text else (),
        mask=hidden,
        visible=None if visible is None else (visible,),
    )


def matrix(call: AttentionCall) -> NDArray[np.float64]:
    """The attention matrix float64 [H, N, M] of the keys that may be seen, and of the rows that are no hidden text."""
    q, k = call.q[0].double().numpy(), call.k[0].double().numpy()
    seen = k.shape[1] if call.visible is None else call.visible[0]
    if call.site.kind not in ("self", "cross"):
        q = q[:, :seen]
    logits = q @ k[:, :seen].swapaxes(-1, -2) * (q.shape[-1] ** -0.5 if call.scale is None else call.scale)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def tokens(call: AttentionCall, side: Literal["rows", "columns"]) -> list[tuple[str, int]]:
    """What each token is, as (text, padding or video, its frame or -1), in order; hidden text is left out."""
    layout = call.layout
    text = [("padding" if pad else "text", -1) for prompt in call.prompts for pad in prompt.padding]
    video = [("video", token // layout.grid.patches) for token in range(layout.grid.size)]
    if call.site.kind == "self" or (call.site.kind == "cross" and side == "rows"):
        return video
    every = text if call.site.kind == "cross" else text + video if layout.order == "text-video" else video + text
    seen = len(every) if call.visible is None else call.visible[0]
    return every[:seen]


def where(call: AttentionCall, side: Literal["rows", "columns"], kind: str, frame: int | None = None) -> list[int]:
    """The tokens of one kind, and of one frame if it is given."""
    found = enumerate(tokens(call, side))
    return [i for i, (name, at) in found if name == kind and frame in (None, at)]


def value_of(readout: Readout, call: AttentionCall) -> Any:
    """What a readout makes of the call."""
    readout.serve(call, readout.where.rows(call.branches))
    (value,) = readout.values.values()
    return value
