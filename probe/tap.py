"""The tap: every attention call of a model's blocks passes through one hub module that nnsight sees.

The processors keep their class and code; only the attention function they call is rerouted, per layer. `NNsight`
wraps the hub, not the model: no idle cost, no clash with offloading, and no operation name of a library version is
spelled out.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from nnsight import NNsight
from torch import Tensor, nn

from probe.block import Afterwards
from probe.call import AttentionCall
from probe.errors import TapError
from probe.gate import gate_of
from probe.hub import Hub
from probe.layout import TokenLayout
from probe.models.family import Family, Slot
from probe.models.rope import Rope
from probe.once import Once, Repeats, shared
from probe.reroute import Route, reroute
from probe.site import Branch, Site
from probe.word import Prompt


class Forward(NamedTuple):
    """What a model forward says of itself: its timestep, its batch, and what the pipeline calls it, if it does."""

    timestep: Tensor
    batch: int
    name: str | None
    step: int | None


class Place(NamedTuple):
    """Where a run is: what a tap adds to the tensors of a call."""

    step: int = -1
    turn: int = 0
    branches: tuple[Branch, ...] = ()
    prompts: tuple[Prompt, ...] = ()


class Tap:
    """Reroutes the attention of a model while open; a context manager that undoes itself, also after an error.

    Inside, `nnsight` is a plain nnsight model of the hub and `layers[i]` its attention calls, for traces of one's own:

        with Tap(pipe.transformer, family) as tap:
            with tap.nnsight.trace(True, fn=lambda _: pipe("...")):
                out = tap.layers[2].output.save()

    `others` are further transformers of the same pipeline with the same blocks, of which one works at a time (Wan 2.2).
    `plain` holds the processors as they were; `passes` counts the batch entries of all layers that were computed.

    Raises:
        TapError: no attention call found, the model is already traced, or gradient checkpointing is on.
    """

    def __init__(self, model: nn.Module, family: Family, *others: nn.Module) -> None:
        self.model, self.family, self.models = model, family, (model, *others)
        self.gate = gate_of(model)
        self.slots = [slot for one in self.models for slot in family.slots(one)]
        self.hub = Hub(family.slots(model))
        self.nnsight = NNsight(self.hub)
        self.on_forward: Callable[[Forward, TokenLayout], Repeats | None] | None = None
        self.place: Callable[[], Place] = Place
        self.observe: Callable[[AttentionCall], None] | None = None
        self.layout: TokenLayout | None = None
        self.plain: list[Any] = []
        self.passes = 0
        self._once = Once(family)
        self._seen: Counter[tuple[int, int]] = Counter()
        self._served: set[tuple[int, int]] = set()
        self._masked: tuple[Tensor | None, tuple[int, ...] | None] = (None, None)
        self._named: tuple[str | None, int | None] = (None, None)
        self._afterwards = Afterwards(family)
        self._rope: Callable[[], Rope | None] = lambda: None
        self._undo: list[Callable[[], object]] = []

    @property
    def layers(self) -> Any:
        """The first attention point of every layer, for plain nnsight."""
        return self.nnsight.layers

    def missed(self) -> list[int]:
        """Layers whose attention has not been seen since the tap was opened."""
        return sorted({slot.layer for slot in self.slots if (slot.layer, slot.call) not in self._served})

    def __enter__(self) -> Tap:
        if any(getattr(model, "gradient_checkpointing", False) for model in self.models) and torch.is_grad_enabled():
            raise TapError(
                "A traced model must not use gradient checkpointing: recomputed calls would run unedited. Got it "
                "switched on. Call disable_gradient_checkpointing() first."
            )
        if self.gate.mine():
            raise TapError(
                "A model must be traced by one run at a time. Got a second run inside the first. Run them one after "
                "the other."
            )
        self.gate.enter()
        self._undo.append(self.gate.leave)
        self.plain = [slot.module.processor for slot in self.slots]
        try:
            for slot in self.slots:
                self._undo.append(reroute(slot.module, lambda route, slot=slot: self._attend(slot, route)))
            for model in self.models:
                self._undo.append(model.register_forward_pre_hook(self._forward, with_kwargs=True).remove)
                self._undo.extend(self._afterwards.listen(model))
                self._undo.extend(self._once.listen(model))
                self._listen(model)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        while self._undo:
            self._undo.pop()()

    def _listen(self, model: Any) -> None:
        """Pipelines name their forwards by `model.cache_context(name)`; note the name on its way."""
        if not hasattr(model, "cache_context"):
            return
        stock = model.cache_context

        @contextlib.contextmanager
        def cache_context(name: str, **told: Any) -> Iterator[None]:
            self._named = name, told.get("step_index")
            try:
                with stock(name, **told):
                    yield
            finally:
                self._named = None, None

        model.cache_context = cache_context
        self._undo.append(lambda: vars(model).pop("cache_context", None))

    def _forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.gate.mine():
            raise TapError(
                "A traced model must be run by the thread that traces it. Got a forward from another thread. Wait "
                "for the trace to end."
            )
        inputs = self.family.inputs(model, args, kwargs)
        self.layout = self.family.layout(model, inputs)
        self._seen, self._masked = Counter(), (None, None)
        self._rope = cache(partial(self.family.rope, model, inputs))  # asked once the weights are on the device
        self._afterwards.begin(self.layout)
        self._once.now = None
        name, step = self._named
        if inputs.get("skip_layers"):  # skip-layer guidance of SD3: a further forward of the conditional half
            name = "cond"
        if self.on_forward is not None:
            forward = Forward(inputs["timestep"], len(inputs["hidden_states"]), name, step)
            self._once.now = self.on_forward(forward, self.layout)

    def _attend(self, slot: Slot, route: Route) -> Tensor:
        """One attention call of the model, [B, H, N, D]."""
        if self.layout is None:
            raise TapError("A tapped attention must run inside its model's forward. Got a call from outside.")
        if slot.kind == "cross" and route.k.shape[-2] != self.layout.text:
            return route.own(route.q, route.k, route.v)  # keys that are no text: Wan's picture tokens
        call = self._call(slot, route, self.layout)
        if self.observe is not None:
            self.observe(call)
        point = self.hub.point(slot)
        point.attend = route.own
        try:
            out = self.hub(call)
        finally:
            del point.attend
        self._afterwards.ask(slot, call.site.call - slot.call, call.later)
        return out

    def _call(self, slot: Slot, route: Route, layout: TokenLayout) -> AttentionCall:
        at, place = (slot.layer, slot.call), self.place()
        nth, self._seen[at] = self._seen[at], self._seen[at] + 1
        self._served.add(at)
        self.passes += len(route.q) if slot.call == 0 else 0
        branches, ragged = place.branches, self.family.ragged
        left = self._once.at(slot.layer)
        stands = left.stands(branches) if left else ()
        branches = tuple(map(shared, stands)) if left else branches
        if ragged:
            branches, layout = branches[nth : nth + 1], layout.with_text(route.q.shape[-2] - layout.grid.size)
        return AttentionCall(
            site=Site(place.step, place.turn, slot.layer, slot.call + nth, slot.kind),
            q=route.q,
            k=route.k,
            v=route.v,
            scale=route.scale,
            layout=layout,
            branches=branches,
            stands=stands,
            prompts=place.prompts,
            mask=route.mask,
            visible=self._visible(route.mask, len(route.q)),
            native=route.native,
            rope=None if slot.kind == "cross" else self._rope(),
        )

    def _visible(self, mask: Tensor | None, batch: int) -> tuple[int, ...] | None:
        """How many keys each batch entry may see, from a key mask [B or 1, 1, 1, M]; None for all. One device sync per
        forward: all layers get the same mask.

        Raises:
            TapError: another mask than one that hides keys at the end.
        """
        if mask is None or mask is self._masked[0]:
            return self._masked[1] if mask is not None else None
        flat = mask.reshape(mask.shape[0], -1)
        counts = flat.sum(-1) if mask.dtype == torch.bool else torch.zeros(len(flat), device=flat.device)
        ends = torch.arange(flat.shape[-1], device=flat.device) < counts.unsqueeze(-1)
        if mask.dim() != 4 or mask.shape[1:3] != (1, 1) or mask.dtype != torch.bool or not torch.equal(ends, flat):
            raise TapError(
                f"A mask of {self.family.name}'s attention must be bool [B, 1, 1, keys] and hide keys at the end. Got "
                f"{mask.dtype} {tuple(mask.shape)}. Leave attention_mask out."
            )
        seen = tuple(counts.expand(batch).tolist())
        self._masked = mask, None if min(seen) == flat.shape[-1] else seen
        return self._masked[1]
