"""Blocks patched by hand: another `forward` on a module, without any of the project's code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from tests.toys.bench import Bench

LISTS = ("transformer_blocks", "single_transformer_blocks", "blocks")

Change = Callable[[Tensor, Tensor, list[int]], Tensor]
"""(what went in, what came out, conditional entries) -> what goes on; the streams [B, N, C] one by one."""


def blocks_of(model: nn.Module) -> list[Any]:
    """All blocks in order."""
    return [block for name in LISTS for block in getattr(model, name, ())]


@contextmanager
def patched_block(
    bench: Bench, layer: int, change: Change, streams: tuple[str, ...] = ("video", "text")
) -> Iterator[None]:
    """Block `layer` of the first transformer gives what `change` makes of the named streams."""
    model = bench.pipe.transformer
    block, forwards = blocks_of(model)[layer], [-1]
    plain = block.forward
    counted = model.register_forward_pre_hook(lambda *_: forwards.__setitem__(0, forwards[0] + 1))

    def forward(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(("hidden_states", "encoder_hidden_states"), args, strict=False)) | kwargs
        entries = len(given["hidden_states"])
        conditional = list(range(entries // 2, entries))
        if bench.turns == 2:
            conditional = [] if forwards[0] % 2 else list(range(entries))

        def put(name: str, out: Tensor | None) -> Tensor | None:
            taken = given["hidden_states" if name == "video" else "encoder_hidden_states"]
            return out if out is None or name not in streams else change(taken, out, conditional)

        made = plain(*args, **kwargs)
        if not isinstance(made, tuple):
            return put("video", made)
        text_first = bench.case.module in ("sd3", "flux")
        return tuple(
            put(name, out)
            for name, out in zip(("text", "video") if text_first else ("video", "text"), made, strict=True)
        )

    block.forward = forward
    try:
        yield
    finally:
        counted.remove()
        del block.forward
