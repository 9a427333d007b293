"""Drawn attention calls for the tests of the algebra, and the whole matrix in float64 to compare with."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from probe.call import AttentionCall
from probe.layout import Grid, TokenLayout
from probe.plan import Handler, Plan
from probe.serve import after_attention, before_attention
from probe.site import Branch, Site
from probe.word import Prompt

GRID = Grid(3, 2, 4)
TEXT = 5
STEPS = 10
PROMPT = Prompt(
    text="a red cat",
    pieces=("a", "red", "cat", "</s>", "<pad>"),
    ids=(3, 4, 5, 1, 0),
    spans=((0, 1), (2, 5), (6, 9), (0, 0), (0, 0)),
    padding=(False, False, False, False, True),
)


def drawn(
    entries: int = 2, heads: int = 3, dtype: torch.dtype = torch.float64, seed: int = 0, step: int = 0, **given: Any
) -> AttentionCall:
    """A call of 5 text tokens and 3 x 2 x 4 video tokens, one entry per prompt, all conditional."""
    layout = given.pop("layout", TokenLayout("text-video", TEXT, GRID))
    rng = torch.Generator().manual_seed(seed)
    shape = (entries, heads, layout.total, 8)
    q, k, v = (torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype) for _ in "qkv")
    branches = tuple(Branch(prompt=i) for i in range(entries))
    site = Site(step, 0, 0)
    return AttentionCall(
        **{
            "site": site,
            "q": q,
            "k": k,
            "v": v,
            "scale": 0.5,
            "layout": layout,
            "branches": branches,
            "prompts": (PROMPT,) * entries,
        }
        | given
    )


def hidden(visible: tuple[int, ...] = (26, 29), **given: Any) -> AttentionCall:
    """A call whose text comes last and is hidden from a key on, in each entry another."""
    layout = TokenLayout("video-text", TEXT, GRID)
    mask = (torch.arange(layout.total) < torch.tensor(visible)[:, None])[:, None, None]
    return drawn(len(visible), layout=layout, mask=mask, visible=visible, **given)


def served(call: AttentionCall, *handlers: Handler) -> Tensor:
    """The output of a call under a plan, as the tap serves it."""
    plan = Plan(handlers, STEPS, 4, call.prompts, kinds={call.site.kind})
    before_attention(call, plan)
    out = call.out
    if out is None:
        out = F.scaled_dot_product_attention(call.q, call.k, call.v, attn_mask=call.mask, scale=call.scale)
    return after_attention(call, plan, out)


class Whole(NamedTuple):
    """One entry in float64: v, the logits and the probabilities [H, N, M], and the output."""

    v: Tensor
    logits: Tensor
    p: Tensor
    out: Tensor


def whole(call: AttentionCall, q: int = 0, k: int = 0, v: int = 0) -> Whole:
    """Attention of the queries, keys and values of some entries, under the mask of the one of k."""
    query, key, value = (call.own[name][at].double() for name, at in (("q", q), ("k", k), ("v", v)))
    logits = 0.5 * query @ key.mT
    if call.visible is not None:
        logits[..., call.visible[k] :] = -torch.inf
    p = logits.softmax(-1)
    return Whole(value, logits, p, p @ value)


def apart(one: Tensor, other: Tensor) -> float:
    """The largest difference."""
    return (one.double() - other.double()).abs().max().item()
