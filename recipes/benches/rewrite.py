"""`mmdit bench rewrite`: what rewriting costs beside plain attention, and beside the same done with a whole matrix.

Two batch entries that take from each other; every row of both is rewritten. For each rewriting the way `probe.weigh`
chose is told, its error against the whole matrix in float64, and the time of the usual form: a dense N x N mask where
there is one, else the weights written out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from control.bias import Bias, BiasTable
from control.closed_form import Identity, Uniform, Within
from control.constant import Constant
from control.extend import Extend
from control.fork import Fork
from control.reweight import Reweight
from control.scale import Temper
from control.transfer import Transfer
from control.variant import Edited
from control.window import Window
from probe import region, serve
from probe.call import AttentionCall
from probe.layout import TokenLayout
from probe.plan import Handler, Plan
from probe.site import Branch, Site
from recipes.benches import usual
from recipes.benches.attention import NAIVE_KEYS, Shape, drawn, prompt_of
from recipes.benches.timing import Method

FRACTIONS = (0.1, 0.3, 0.5, 0.7)
"""Shares of the video inside a mask, for the curve of mask-guided sharing."""


@dataclass(frozen=True)
class Rewrite:
    """One line: its edits, the usual form of the same, and the ratio to plain attention it should stay below."""

    name: str
    edits: Sequence[Handler]
    dense: usual.Dense
    target: float | None = None
    form: str = "N x N mask"


class Bench:
    """One random call of two entries; logits have a standard deviation of about 2."""

    def __init__(self, shape: Shape, device: str, dtype: torch.dtype) -> None:
        self.layout, self.prompt = TokenLayout("text-video", shape.text, shape.grid), prompt_of(shape.text)
        rng = torch.Generator().manual_seed(0)
        self.tensors = drawn(shape, 2, device, dtype, rng)
        self.masks = {share: torch.rand(shape.grid.shape, generator=rng) < share for share in FRACTIONS}

    def methods(self) -> list[Method]:
        """Plain attention first, then each rewriting and its usual form."""
        q, k, v = self.tensors
        methods = [Method("rewrite", "plain attention", lambda: F.scaled_dot_product_attention(q, k, v), extra=False)]
        for rewrite in self.rewrites():
            methods += self._lines(rewrite)
        return methods

    def _lines(self, rewrite: Rewrite) -> list[Method]:
        plan = Plan(rewrite.edits, 1, 1, (self.prompt, self.prompt))
        own = Method(
            "rewrite",
            f"{rewrite.name}{self._way(plan)}",
            lambda: self.run(plan, self.tensors),
            False,
            rewrite.target,
            lambda: self._error(plan, rewrite),
        )
        if self.layout.total > NAIVE_KEYS:
            return [replace(own, error=None)]
        q, k, v = self.tensors
        return [own, Method("usual form", f"  by {rewrite.form}", lambda: rewrite.dense(q, k, v), extra=False)]

    def run(self, plan: Plan, tensors: Sequence[Tensor]) -> Tensor:
        """The output of a call under a plan, as a trace serves it."""
        q, k, v = tensors
        branches = (Branch(prompt=0), Branch(prompt=1))
        call = AttentionCall(Site(0, 0, 0), q, k, v, None, self.layout, branches, (self.prompt, self.prompt))
        serve.before_attention(call, plan)
        out = F.scaled_dot_product_attention(call.q, call.k, call.v) if call.out is None else call.out
        return serve.after_attention(call, plan, out)

    def _way(self, plan: Plan) -> str:
        self.run(plan, self.tensors)
        ways = sorted({way for _, way in plan.how})
        return f" ({', '.join(ways)})" if ways else ""

    def _error(self, plan: Plan, rewrite: Rewrite) -> float:
        """Largest difference to the whole matrix in float64, relative to the largest value; head by head."""
        found, worst = self.run(plan, self.tensors).double().cpu(), 0.0
        for head in range(found.shape[1]):
            q, k, v = (tensor[:, head : head + 1].double().cpu() for tensor in self.tensors)
            exact = rewrite.dense(q, k, v)
            worst = max(worst, float((found[:, head : head + 1] - exact).abs().max() / exact.abs().max()))
        return worst

    def rewrites(self) -> list[Rewrite]:
        """The table of rewritings."""
        text, word = ~region.video(), region.words("one")
        frames = tuple(region.frames(frame) for frame in range(self.layout.frames))
        table = torch.randn(len(frames) + 1, len(frames) + 1, generator=torch.Generator().manual_seed(1))
        groups = BiasTable((text, *frames), table.tolist())
        video = self._indicator(region.video())
        hot = self._indicator(word)
        return [
            Rewrite("keys and values swapped", [Transfer("kv", _other)], usual.swapped(k=True, v=True), form="swap"),
            Rewrite("queries and keys swapped", [Transfer("qk", _other)], usual.swapped(q=True, k=True), form="swap"),
            Rewrite("a quarter of identity", [Fork(Identity(), strength=0.25)], usual.soft_identity, form="weights"),
            Rewrite("every key alike", [Fork(Uniform())], usual.mean_of_values, form="mean"),
            Rewrite(
                "own key's odds x 3", [Fork(Identity(raised=math.log(2)), merge="lse")], usual.own_key, None, "weights"
            ),
            Rewrite("a key of no value", [Extend(Constant("zero"), bias=5.0)], usual.null_key, form="concatenation"),
            Rewrite("bias on text columns", [Bias(1.0, text)], self._mask((~video).float()), 1.1),
            Rewrite("text columns hidden", [Bias(-math.inf, text)], self._mask(usual.hide(~video)), 1.1),
            Rewrite("text twice as sharp", [Temper(2.0, rows=text)], self._sharp(~video), form="weights"),
            Rewrite(
                "one word x 3, renormalised",
                [Reweight(word, 3.0, "renormalised", rows=None)],
                self._mask(math.log(3) * hot.float()),
                1.05,
            ),
            Rewrite(
                "one word x -5, raw", [Reweight(word, -5.0, rows=None)], usual.raw_columns(hot, -5.0), 1.05, "weights"
            ),
            Rewrite("regions, frames and text", [groups], self._table(table), 1.25),
            Rewrite("frames 1 to either side", [Window(frames=1)], self._near(1)),
            Rewrite("keys concatenated", [Extend(_other, columns=None)], usual.concatenated, 2.1, "concatenation"),
            Rewrite(
                "two variants, soft mask",
                [Fork(Edited(Transfer("kv", _other)), gate=self._soft())],
                usual.blended(self._flat(self._soft())),
                None,
                "two calls",
            ),
            Rewrite("the source's video map, own mass", [_video_map()], usual.own_mass(~video), None, "weights"),
            *[self._guided(share) for share in FRACTIONS],
        ]

    def _guided(self, share: float) -> Rewrite:
        """DiTCtrl's mask-guided sharing: the inside looks at the source's inside, the outside at its outside."""
        mask = self.masks[share]
        inside = region.tokens(mask.numpy())
        apart = [[0.0, -math.inf], [-math.inf, 0.0]]
        edits = [Transfer("kv", _other), BiasTable((inside, region.video() & ~inside), apart)]
        target = 0.75 if share == 0.3 else None
        return Rewrite(
            f"mask-guided sharing, masks {share:g}",
            edits,
            usual.two_passes(self._flat(mask), self.layout.text),
            target,
            "two calls",
        )

    def _flat(self, video: Tensor) -> Tensor:
        """Per token, 0 on text."""
        return torch.cat([torch.zeros(self.layout.text, dtype=video.dtype), video.flatten()])

    def _indicator(self, area: region.Region) -> Tensor:
        return torch.as_tensor(area.mask(self.layout, self.prompt))

    def _soft(self) -> Tensor:
        return torch.rand(self.layout.grid.shape, generator=torch.Generator().manual_seed(2))

    def _mask(self, columns: Tensor) -> usual.Dense:
        """Added to the logits of every row."""
        return usual.additive(lambda: columns.expand(self.layout.total, -1))

    def _table(self, table: Tensor) -> usual.Dense:
        group = torch.cat([torch.zeros(self.layout.text), 1 + self._frame()]).long()
        return usual.additive(lambda: table[group][:, group])

    def _near(self, frames: int) -> usual.Dense:
        text = torch.full((self.layout.text,), math.nan)
        frame = torch.cat([text, self._frame()])
        return usual.additive(lambda: usual.hide((frame[:, None] - frame).abs() > frames))

    def _frame(self) -> Tensor:
        return torch.arange(self.layout.grid.size).div(self.layout.grid.patches, rounding_mode="floor").float()

    def _sharp(self, rows: Tensor) -> usual.Dense:
        def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            sharp = torch.where(rows.to(q.device)[:, None], 2 * q, q)
            return usual.matrix(sharp, k) @ v

        return dense


def _other(branch: Branch) -> Branch:
    return replace(branch, prompt=1 - branch.prompt)


def _video_map() -> Fork:
    theirs = Edited(Transfer("qk", _other), Bias(-math.inf, ~region.video()))
    return Fork(Within(theirs, region.video()), rows=region.video())
