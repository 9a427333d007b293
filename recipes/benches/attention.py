"""`mmdit bench attention`: what each readout costs beside plain attention of one call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from probe import attend
from probe.call import AttentionCall
from probe.errors import UsageError
from probe.layout import Grid, TokenLayout
from probe.readout.base import Readout
from probe.readout.column import ColumnMass
from probe.readout.entropy import Entropy
from probe.readout.frame import FrameMass
from probe.readout.mass import RegionMass
from probe.readout.sparsity import Sparsity
from probe.readout.token import TokenMass
from probe.readout.word import WordMaps
from probe.site import Branch, Site
from probe.word import Prompt
from recipes.benches.timing import Method

WORDS = ("one", "two", "three", "four", "five", "six")
NAIVE_KEYS = 4096
"""Above this many keys the whole matrix is not built, even to compare."""


@dataclass(frozen=True)
class Shape:
    """One attention call: text tokens, grid, heads, head width."""

    text: int
    grid: Grid
    heads: int
    width: int = 64

    def __str__(self) -> str:
        return (
            f"{self.text + self.grid.size} tokens ({self.text} text + {self.grid}), {self.heads} heads of {self.width}"
        )


SHAPES = {
    "tiny": Shape(8, Grid(3, 8, 8), 4),
    "mini": Shape(34, Grid(13, 6, 10), 4),
    "small": Shape(59, Grid(13, 9, 17), 8),
    "medium": Shape(66, Grid(13, 10, 31), 8),
    "cogvideox-1head": Shape(226, Grid(13, 30, 45), 1),
    "cogvideox-2b": Shape(226, Grid(13, 30, 45), 30),
    "cogvideox-5b": Shape(226, Grid(13, 30, 45), 48),
    "hunyuan": Shape(256, Grid(33, 45, 80), 24, 128),
}


def shape_of(name: str) -> Shape:
    """A shape by name.

    Raises:
        UsageError: no such shape; lists them.
    """
    if name not in SHAPES:
        raise UsageError(f"A size must be one of {', '.join(SHAPES)}. Got {name!r}.")
    return SHAPES[name]


def drawn(shape: Shape, entries: int, device: str, dtype: torch.dtype, generator: torch.Generator) -> list[Tensor]:
    """Random q, k, v [entries, H, N, D] whose logits have a standard deviation of about 2."""
    size = (entries, shape.text + shape.grid.size, shape.heads, shape.width)
    q, k, v = (torch.randn(size, generator=generator).transpose(1, 2) for _ in "qkv")
    return [tensor.to(device=device, dtype=dtype) for tensor in (q * 2, k, v)]


class Bench:
    """One random attention call and the methods to time on it; logits have a standard deviation of about 2."""

    def __init__(self, shape: Shape, device: str, dtype: torch.dtype) -> None:
        self.shape, self.layout = shape, TokenLayout("text-video", shape.text, shape.grid)
        self.tensors = drawn(shape, 1, device, dtype, torch.Generator().manual_seed(0))
        self.prompt = prompt_of(shape.text)
        self.current = self.call(*self.tensors)

    def call(self, q: Tensor, k: Tensor, v: Tensor) -> AttentionCall:
        """A fresh call, its attention not yet computed."""
        return AttentionCall(Site(0, 0, 0), q, k, v, None, self.layout, (Branch(),), (self.prompt,))

    def renew(self) -> None:
        """A call whose attention is done: what a readout adds is timed on it."""
        self.current = self.call(*self.tensors)
        self.current.run_with_lse()

    def methods(self) -> list[Method]:
        """Plain attention first."""
        q, k, v = self.tensors
        methods = [
            Method("base", "plain attention", lambda: F.scaled_dot_product_attention(q, k, v), extra=False),
            Method("base", "with log-sum-exp", lambda: attend.plain(q, k, v), extra=False, target=1.03),
        ]
        if self.layout.total <= NAIVE_KEYS:
            methods.append(Method("base", "whole matrix, then its sums", self._naive, extra=False))
        methods += [
            self._readout("words, 6", WordMaps(*WORDS, directions=("vt",)), 0.02),
            self._readout("all text columns", TokenMass(), 0.03),
            self._readout("region mass", RegionMass()),
            self._readout("frame to frame", FrameMass()),
            Method("record", "frame to frame, fused with the output", self._fused, False, 1.2, self._fused_error),
            self._readout("column mass", ColumnMass(), 1.1),
            self._readout("entropy", Entropy(participation=False), 1.1),
            self._readout("entropy and participation", Entropy()),
            self._readout("sparsity, 64 rows a frame", Sparsity()),
        ]
        return methods

    def _readout(self, name: str, readout: Readout, target: float | None = None) -> Method:
        def error() -> float:
            return _difference(self._reduced(readout, self.tensors), self._reduced(readout, self._double()))

        return Method("record", name, lambda: _reduce(readout, self.current), True, target, error, self.renew)

    def _reduced(self, readout: Readout, tensors: list[Tensor]) -> Any:
        call = self.call(*tensors)
        call.run_with_lse()
        return _reduce(readout, call)

    def _double(self) -> list[Tensor]:
        return [tensor.double() for tensor in self.tensors]

    def _fused(self) -> Any:
        call = self.call(*self.tensors)
        call.run_in_parts()
        return _reduce(FrameMass(), call)

    def _fused_error(self) -> float:
        call, exact = self.call(*self.tensors), self._double()
        call.run_in_parts()
        out = F.scaled_dot_product_attention(exact[0], exact[1], exact[2])
        assert call.out is not None
        return float((call.out.double() - out).abs().max() / out.abs().max())

    def _naive(self) -> None:
        """Softmax over the whole matrix, head mean of the map, sums over rows and columns."""
        q, k, v = self.tensors
        weights = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, -1)
        _ = weights @ v
        _ = weights.mean(1), weights.sum(-2), (weights * weights.clamp_min(1e-30).log()).sum(-1)


def _reduce(readout: Readout, call: AttentionCall) -> Any:
    return readout.reduce(call.entry(0))


def _difference(found: Any, exact: Any) -> float:
    """Largest difference, relative to the largest value, over all values a readout gives."""
    if isinstance(found, dict):
        return max(_difference(found[name], exact[name]) for name in found)
    if not found.is_floating_point():
        return 0.0
    a, b = found.double().cpu(), exact.double().cpu()
    known = torch.isfinite(a) & torch.isfinite(b)
    if not known.any():
        return 0.0
    return float((a - b)[known].abs().max() / b[known].abs().max().clamp_min(1e-30))


def prompt_of(text: int) -> Prompt:
    """`text` tokens: six words, an end, and padding."""
    count, starts = min(len(WORDS), text), [0]
    for word in WORDS:
        starts.append(starts[-1] + len(word) + 1)
    spans = [(starts[i], starts[i] + len(WORDS[i])) for i in range(count)] + [(0, 0)] * (text - count)
    return Prompt(" ".join(WORDS), ("",) * text, (0,) * text, tuple(spans), tuple(i > count for i in range(text)))
