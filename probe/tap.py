"""The tap: every joint-attention call of a model passes through one hub module that nnsight sees.

The processors keep their class and code; only the attention function they call is rerouted, per layer. `NNsight`
wraps the hub, not the model: no idle cost, no clash with offloading, and no operation name of a library version is
spelled out.
"""

from __future__ import annotations

import threading
import types
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from nnsight import NNsight
from torch import Tensor, nn

from probe.call import AttentionCall
from probe.errors import TapError
from probe.layout import TokenLayout
from probe.models.family import Family
from probe.site import Site


@dataclass
class _Gate:
    """Who traces a model: one thread at a time."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    owner: int | None = None

    def mine(self) -> bool:
        return self.owner == threading.get_ident()

    def enter(self) -> None:
        """Waits until another thread's run ends."""
        self.lock.acquire()
        self.owner = threading.get_ident()

    def leave(self) -> None:
        self.owner = None
        self.lock.release()


_GATES: weakref.WeakKeyDictionary[nn.Module, _Gate] = weakref.WeakKeyDictionary()


class AttentionPoint(nn.Module):
    """The attention call of one layer as a module: `.inputs`, `.output` and `.skip` in a trace of one's own."""

    attend: Callable[[Tensor, Tensor, Tensor], Tensor]

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v and the result are [B, H, N, D]."""
        return self.attend(q, k, v)


class Hub(nn.Module):
    """Where all attention calls meet, in model order. A call of None ends a trace."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(AttentionPoint() for _ in range(layers))

    def forward(self, call: AttentionCall | None) -> Tensor | None:
        """Run the model's own attention on the tensors the call now holds."""
        return None if call is None else self.layers[call.site.layer](call.q, call.k, call.v)


class Tap:
    """Reroutes the attention of `model` while open; a context manager that undoes itself, also after an error.

    Inside, `nnsight` is a plain nnsight model of the hub and `layers[i]` its attention calls, for traces of one's own:

        with Tap(pipe.transformer, family) as tap:
            with tap.nnsight.trace(True, fn=lambda _: pipe("...")):
                out = tap.layers[2].output.save()

    `plain` holds the processors as they were, by layer.

    Raises:
        TapError: no attention call found, the model is already traced, or gradient checkpointing is on.
    """

    def __init__(self, model: nn.Module, family: Family) -> None:
        self.model, self.family = model, family
        self.gate = _GATES.setdefault(model, _Gate())
        self.modules = family.attention_modules(model)
        self.hub = Hub(len(self.modules))
        self.nnsight = NNsight(self.hub)
        self.seen: Counter[int] = Counter()
        self.on_forward: Callable[[Tensor, int, TokenLayout], None] | None = None
        self.make_call: Callable[..., AttentionCall] = _bare_call
        self.layout: TokenLayout | None = None
        self.plain: list[Any] = []
        self._undo: list[Callable[[], object]] = []

    @property
    def layers(self) -> Any:
        """The attention points, for plain nnsight."""
        return self.nnsight.layers

    def __enter__(self) -> Tap:
        if getattr(self.model, "gradient_checkpointing", False) and torch.is_grad_enabled():
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
        self.plain = []
        try:
            for layer, module in enumerate(self.modules):
                self._reroute(layer, module)
            handle = self.model.register_forward_pre_hook(self._forward, with_kwargs=True)
            self._undo.append(handle.remove)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        while self._undo:
            self._undo.pop()()

    def _forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.gate.mine():
            raise TapError(
                "A traced model must be run by the thread that traces it. Got a forward from another thread. Wait "
                "for the trace to end."
            )
        inputs = self.family.inputs(model, args, kwargs)
        self.layout = self.family.layout(model, inputs)
        self.seen = Counter()
        if self.on_forward is not None:
            self.on_forward(inputs["timestep"], len(inputs["hidden_states"]), self.layout)

    def _reroute(self, layer: int, module: nn.Module) -> None:
        """Give one attention module a processor of a subclass whose code sees another `F`."""
        old: Any = module.processor
        self.plain.append(old)
        function: Any = type(old).__call__
        if "scaled_dot_product_attention" not in function.__code__.co_names:
            raise TapError(
                f"An attention processor must call F.scaled_dot_product_attention. Got {type(old).__name__}, which "
                "does not. Restore the model's own processors."
            )
        functional = _Functional("torch.nn.functional")
        functional.scaled_dot_product_attention = self._routed(layer)  # type: ignore[attr-defined]
        # a code object per layer: torch.compile caches by code object, whatever its globals
        code = function.__code__.replace()
        scope = {**function.__globals__, "F": functional}
        call = types.FunctionType(code, scope, function.__name__, function.__defaults__, function.__closure__)
        call.__kwdefaults__ = function.__kwdefaults__
        new = object.__new__(type(type(old).__name__, (type(old),), {"__call__": call}))
        new.__dict__.update(vars(old))
        module.processor = new  # type: ignore[assignment]
        self._undo.append(lambda: _restore(module, new, old))

    def _routed(self, layer: int) -> Callable[..., Tensor]:
        point: Any = self.hub.layers[layer]

        def routed(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **rest: Any) -> Tensor:
            if attn_mask is not None:
                raise TapError(
                    f"The joint attention of {self.family.name} must have no mask. Got one of "
                    f"{tuple(attn_mask.shape)}. Leave attention_mask out."
                )
            if self.layout is None:
                raise TapError("A tapped attention must run inside its model's forward. Got a call from outside.")
            nth, self.seen[layer] = self.seen[layer], self.seen[layer] + 1
            point.attend = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **rest)
            try:
                return self.hub(self.make_call(layer, nth, query, key, value, rest.get("scale"), self.layout))
            finally:
                del point.attend

        return torch.compiler.disable(routed)  # type: ignore[return-value] (a graph break, not a crash of the compiler)


class _Functional(types.ModuleType):
    """Stands in for torch.nn.functional in a processor's globals."""

    def __getattr__(self, name: str) -> Any:
        return getattr(F, name)


def _restore(module: nn.Module, mine: object, old: object) -> None:
    if module.processor is mine:  # somebody else's processor is left alone
        module.processor = old  # type: ignore[assignment]


def _bare_call(
    layer: int, nth: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None, layout: TokenLayout
) -> AttentionCall:
    return AttentionCall(Site(-1, 0, layer, nth), q, k, v, scale, layout, branches=())
