"""The attention calls of a stock pipeline, followed by hooks on its blocks, without any of the project's code."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tests.oracle import patched_attention

BLOCKS = ("transformer_blocks", "single_transformer_blocks", "blocks")

Serve = Callable[["StockCall", Callable[..., Tensor], Tensor, Tensor, Tensor], Tensor]


class StockCall(NamedTuple):
    """One attention call of a guided run: the step, the forward in the step, the block through all lists of blocks, the
    nth call of the block, and which rows of its batch are conditional.
    """

    step: int
    turn: int
    layer: int
    nth: int
    rows: int
    conditional: tuple[int, ...]


@dataclass
class _At:
    forward: int = -1
    batch: int = 0
    layer: int | None = None
    nth: int = 0


@contextmanager
def followed(pipe: Any, turns: int, serve: Serve | None = None) -> Iterator[list[StockCall]]:
    """The attention calls of the blocks while a pipeline runs, in order.

    `turns` are the forwards of a step: two where each half of guidance has its own, the conditional one first; else a
    batch holds [unconditional.., conditional..]. `serve(call, run, q, k, v)` may attend in place of the model, whose
    own attention is `run(q, k, v)`; tensors [B, H, N, D].
    """
    calls: list[StockCall] = []
    at = _At()

    def attend(plain: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, **rest: Any) -> Tensor:
        run = functools.partial(plain, **rest)
        if at.layer is None:  # text encoders, poolers and refiners attend too
            return run(q, k, v)
        conditional = _conditional(at, turns, len(q))
        call = StockCall(*divmod(at.forward, turns), at.layer, at.nth, len(q), conditional)
        at.nth += 1
        calls.append(call)
        return serve(call, run, q, k, v) if serve else run(q, k, v)

    with ExitStack() as hooks, patched_attention(attend):
        for model in (pipe.transformer, getattr(pipe, "transformer_2", None)):
            for handle in _hooks(model, at) if model is not None else ():
                hooks.callback(handle.remove)
        yield calls


def _hooks(model: nn.Module, at: _At) -> Iterator[Any]:
    def begin(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        at.forward, at.batch = at.forward + 1, len(kwargs["hidden_states"])

    def enter(layer: int) -> None:
        at.layer, at.nth = layer, 0

    def leave(*_: object) -> None:
        at.layer = None

    yield model.register_forward_pre_hook(begin, with_kwargs=True)
    blocks = [block for name in BLOCKS for block in getattr(model, name, ())]
    for layer, block in enumerate(blocks):
        yield block.register_forward_pre_hook(lambda *_, layer=layer: enter(layer))
        yield block.register_forward_hook(leave)


def _conditional(at: _At, turns: int, rows: int) -> tuple[int, ...]:
    if turns == 2:
        return tuple(range(rows)) if at.forward % 2 == 0 else ()
    entries = range(rows) if rows == at.batch else [at.nth]  # Mochi: one call per entry
    return tuple(row for row, entry in enumerate(entries) if entry >= at.batch // 2)


def arguments_of(model: nn.Module, run: Callable[[], object]) -> list[dict[str, Any]]:
    """What each forward of a model is given while `run()` runs."""
    kept: list[dict[str, Any]] = []
    handle = model.register_forward_pre_hook(lambda *given: kept.append(given[-1]), with_kwargs=True)
    run()
    handle.remove()
    return kept


@torch.no_grad()
def first_layer(model: Any, arguments: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    """q and k [H, N, D] of the last batch entry in each call of block 0."""
    kept: list[tuple[Tensor, Tensor]] = []

    def keep(call: StockCall, run: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if call.layer == 0:
            kept.append((q[-1].clone(), k[-1].clone()))
        return run(q, k, v)

    with followed(SimpleNamespace(transformer=model), 1, keep):
        model(**arguments)
    return kept


def with_patch(video: Tensor, patch: tuple[int, int, int], grid: tuple[int, int, int], axis: int | None) -> Tensor:
    """Latents with one patch (frame, row, column) of the last entry changed; `axis` is that of the frames, and packed
    latents [B, N, C] have one token per patch.
    """
    (frame, y, x), (frames, rows, columns), moved = patch, grid, video.clone()
    part = moved[-1:]
    if video.dim() == 3:
        part[:, y * columns + x] += 1
        return moved
    if axis is not None:
        part = part.narrow(axis, frame * video.shape[axis] // frames, video.shape[axis] // frames)
    height, width = video.shape[-2] // rows, video.shape[-1] // columns
    part[..., y * height : (y + 1) * height, x * width : (x + 1) * width] += 1
    return moved


def silence(model: nn.Module, *names: str) -> None:
    """Let modules whose name ends in one of `names` give zero, so that tokens stay by themselves."""
    for name, parameter in model.named_parameters():
        if any(f".{name}".endswith((f".{end}.weight", f".{end}.bias")) for end in names):
            nn.init.zeros_(parameter)
