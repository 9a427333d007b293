"""What edits ask for outside of attention: changes of what an attention module, a feed-forward or a block returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from probe.errors import TapError
from probe.layout import TokenLayout
from probe.models.family import Family, Slot
from probe.site import JOINT

Point = Literal["attention", "feed_forward", "block"]

_STREAMS = {"hidden_states": "video", "encoder_hidden_states": "text"}
"""What a stream is called by the arguments of a module, in every family."""


@dataclass(frozen=True)
class Streams:
    """Rows of video [..., N_video, C] and of text [..., N_text, C'], None where a module has none of them.

    The text holds its padding, also where the calls of the model leave it out (Mochi).
    """

    video: Tensor | None
    text: Tensor | None

    @classmethod
    def parted(cls, mask: Tensor | None, rows: TokenLayout) -> Streams:
        """A mask over the rows of a call, bool [N], as one for each stream; None for all rows."""
        return cls(None, None) if mask is None else cls(mask[rows.video_slice], mask[rows.text_slice])

    def each(self, of: Callable[..., Tensor], *others: Streams) -> Streams:
        """`of(x, *others)` for each stream there is."""
        video = None if self.video is None else of(self.video, *(other.video for other in others))
        text = None if self.text is None else of(self.text, *(other.text for other in others))
        return Streams(video, text)

    def on_video(self, of: Callable[[Tensor], Tensor]) -> Streams:
        """`of(video)`, and the text as it is."""
        return replace(self, video=None if self.video is None else of(self.video))

    def where(self, mask: Streams, new: Streams) -> Streams:
        """`new` in the rows of the mask, these in the others; rows behind the end of the mask are others."""
        return self.each(_where, mask, new)


@dataclass(frozen=True)
class Later:
    """When `point` of this block returns, `change(inputs, outputs)` gives what the model goes on with, for batch entry
    `entry` of the call that asks; its streams are [n, C].

    "attention" is the module of that call: what it gives before the gate and the residual. In a single-stream block it
    is one part of what goes into the shared output projection, and "feed_forward" is the other part, without inputs.
    Feed-forwards of video and text may be two modules, with one stream each: the change is asked for both. What one
    edit (`by`) asks for at several calls of a layer counts once.
    """

    point: Point
    entry: int
    change: Callable[[Streams, Streams], Streams]
    by: object = None


@dataclass(frozen=True)
class _Spot:
    """A module that may be asked for: a tuple it returns holds the streams `order`, a single tensor holds `alone`.

    `mixed`: the output projection of a single-stream block, asked for its input, [attention | feed-forward].
    """

    module: nn.Module
    layer: int
    point: Point
    call: int = 0
    order: tuple[str, ...] = ("video", "text")
    alone: str = "video"
    mixed: bool = False

    @property
    def key(self) -> tuple[int, Point, int]:
        return self.layer, self.point, self.call


@dataclass
class Afterwards:
    """Applies what the calls of a forward ask for, by hooks on the modules; touches nothing where nothing is asked."""

    family: Family
    layout: TokenLayout | None = None
    _asked: dict[tuple[int, Point, int], dict[object, tuple[int, Later]]] = field(default_factory=dict)

    def begin(self, layout: TokenLayout) -> None:
        """A forward begins; what an unfinished one asked for is forgotten."""
        self.layout, self._asked = layout, {}

    def ask(self, slot: Slot, first: int, requests: Sequence[Later]) -> None:
        """Take the requests of a call; `first` is its first batch entry."""
        for later in requests:
            key = slot.layer, later.point, slot.call if later.point == "attention" else 0
            entry, by = first + later.entry, later if later.by is None else later.by
            self._asked.setdefault(key, {}).setdefault((entry, id(by)), (entry, later))

    def listen(self, model: nn.Module) -> Iterator[Callable[[], None]]:
        """Hook a model; gives what undoes each hook."""
        for spot in _spots(self.family, model):
            if spot.mixed:
                yield spot.module.register_forward_pre_hook(eager(partial(self._takes, spot))).remove
            else:
                yield spot.module.register_forward_hook(eager(partial(self._returns, spot)), with_kwargs=True).remove

    def _takes(self, spot: _Spot, module: Any, args: tuple[Tensor, ...]) -> Tensor | None:
        """What the shared projection of a single-stream block goes on with, None as it is."""
        asked = self._due(spot)
        if not asked:
            return None
        mixed = args[0].clone()
        feed_forward = mixed[..., module.out_features :]  # behind the attention, which is as wide as the stream
        self._change(asked, Streams(None, None), self._streams({"joint": feed_forward}))
        return mixed

    def _returns(self, spot: _Spot, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        """What the model goes on with, None as it is."""
        asked = self._due(spot)
        if not asked:
            return None
        given = self.family.inputs(module, args, kwargs)
        if isinstance(out, tuple):
            taken = {stream: given.get(name) for name, stream in _STREAMS.items()}
            made = tuple(None if x is None else x.clone() for x in out)
            self._change(asked, self._streams(taken), self._streams(dict(zip(spot.order, made, strict=False))))
        else:
            taken = {spot.alone: given.get("hidden_states", next(iter(given.values())))}
            made = out.clone()
            self._change(asked, self._streams(taken), self._streams({spot.alone: made}))
        return made

    def _due(self, spot: _Spot) -> list[tuple[int, Later]]:
        """What is asked of a module, by batch entry; behind its block nothing of a layer is left."""
        asked = list(self._asked.get(spot.key, {}).values())
        if spot.point == "block":
            self._asked.clear()
        return asked

    def _change(self, asked: Sequence[tuple[int, Later]], before: Streams, after: Streams) -> None:
        """Write what each request gives into `after`."""
        device = next(x.device.type for x in (after.video, after.text) if x is not None)
        with torch.no_grad(), torch.autocast(device, enabled=False):
            for entry, later in asked:
                taken, made = (streams.each(lambda x, at=entry: x[at]) for streams in (before, after))
                made.each(Tensor.copy_, later.change(taken, made))

    def _streams(self, held: Mapping[str, Tensor | None]) -> Streams:
        """Views on what a module took or gave.

        Raises:
            TapError: other rows than the layout's.
        """
        layout, joint, video = self.layout, held.get("joint"), held.get("video")
        assert layout is not None
        rows, wanted = (video, layout.grid.size) if joint is None else (joint, layout.total)
        if rows is not None and rows.shape[1] != wanted:
            raise TapError(
                f"A change outside of attention must see all {wanted} rows at once. Got {rows.shape[1]}. Switch "
                "forward chunking off."
            )
        if joint is not None:
            return Streams(joint[:, layout.video_slice], joint[:, layout.text_slice])
        return Streams(video, held.get("text"))


def _spots(family: Family, model: nn.Module) -> Iterator[_Spot]:
    for slot in family.slots(model):
        alone = "joint" if slot.kind in JOINT else "video"
        yield _Spot(slot.module, slot.layer, "attention", slot.call, alone=alone)
    single = {attention.blocks for attention in family.attentions if attention.kind == "single"}
    for layer, (name, block) in enumerate(family.blocks(model)):
        names, mixed = family.feed_forwards[name], name in single
        both = ("video", "text") if len(names) > 1 else ("joint",) if family.kinds & JOINT else ("video",)
        for module, stream in zip(names, both, strict=True):
            if getattr(block, module, None) is not None:
                yield _Spot(getattr(block, module), layer, "feed_forward", alone=stream, mixed=mixed)
        yield _Spot(block, layer, "block", order=tuple(_STREAMS[stream] for stream in family.streams))


def eager(hook: Callable[..., Any]) -> Any:
    """A hook that torch.compile leaves alone."""
    return torch.compiler.disable(hook)


def _where(x: Tensor, mask: Tensor | None, new: Tensor) -> Tensor:
    if mask is None:
        return new
    return torch.where(F.pad(mask, (0, len(x) - len(mask))).unsqueeze(-1), new, x)
