"""Reroute the attention function of one processor: same class, same code, another `F` or `dispatch_attention_fn`."""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from probe.errors import TapError

_FUSED, _DISPATCH = "scaled_dot_product_attention", "dispatch_attention_fn"


@dataclass(frozen=True)
class Route:
    """One attention call on its way: q [B, H, N, D], k, v [B, H, M, D], the model's mask and scale, and `own`, the
    attention the model would have run, on tensors of the same shapes. `native`: it is torch's own.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    scale: float | None
    own: Callable[[Tensor, Tensor, Tensor], Tensor]
    native: bool


def reroute(module: Any, attend: Callable[[Route], Tensor]) -> Callable[[], None]:
    """Give `module` a processor that asks `attend` wherever its own called torch's or diffusers' attention function.

    Returns what undoes it.

    Raises:
        TapError: the processor calls neither.
    """
    old: Any = module.processor
    function: Any = type(old).__call__
    names = function.__code__.co_names
    if _DISPATCH in names:
        stand_in: Any = torch.compiler.disable(_dispatched(function.__globals__[_DISPATCH], attend))
        scope = {**function.__globals__, _DISPATCH: stand_in}
    elif _FUSED in names:
        functional: Any = _Functional("torch.nn.functional")
        functional.scaled_dot_product_attention = torch.compiler.disable(_fused(attend))
        scope = {**function.__globals__, "F": functional}
    else:
        raise TapError(
            f"An attention processor must call F.{_FUSED} or {_DISPATCH}. Got {type(old).__name__}, which does "
            "neither. Restore the model's own processors."
        )
    new = _with_scope(old, function, scope)
    module.processor = new
    return lambda: _restore(module, new, old)


def _with_scope(old: Any, function: Any, scope: dict[str, Any]) -> Any:
    # a code object of its own: torch.compile caches by code object, whatever its globals
    code = function.__code__.replace()
    call = types.FunctionType(code, scope, function.__name__, function.__defaults__, function.__closure__)
    call.__kwdefaults__ = function.__kwdefaults__
    new = object.__new__(type(type(old).__name__, (type(old),), {"__call__": call}))
    new.__dict__.update(vars(old))
    return new


def _fused(attend: Callable[[Route], Tensor]) -> Callable[..., Tensor]:
    """Stands in for F.scaled_dot_product_attention; tensors [B, H, N, D]."""

    def routed(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **rest: Any) -> Tensor:
        def own(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, **rest)

        q, k, v = (_as_attended(x) for x in (query, key, value))
        return attend(Route(q, k, v, attn_mask, rest.get("scale"), own, native=True))

    return routed


def _dispatched(stock: Any, attend: Callable[[Route], Tensor]) -> Callable[..., Tensor]:
    """Stands in for diffusers' dispatch_attention_fn; tensors [B, N, H, D]."""

    def routed(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **rest: Any) -> Tensor:
        def own(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return _swap(stock(_swap(q), _swap(k), _swap(v), attn_mask=attn_mask, **rest))

        native = _is_native(rest.get("backend")) and rest.get("parallel_config") is None
        q, k, v = (_swap(_as_attended(x)) for x in (query, key, value))
        return _swap(attend(Route(q, k, v, attn_mask, rest.get("scale"), own, native)))

    return routed


def _as_attended(tensor: Tensor) -> Tensor:
    """In the dtype that attention has under autocast, which casts its inputs itself."""
    device = tensor.device.type
    if not torch.is_autocast_enabled(device) or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


def _swap(tensor: Tensor) -> Tensor:
    """[B, N, H, D] and back."""
    return tensor.transpose(1, 2)


def _is_native(backend: Any) -> bool:
    """Whether diffusers' backend (None: the active one) is torch's own scaled dot product attention."""
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    name = _AttentionBackendRegistry.get_active_backend()[0] if backend is None else backend
    return AttentionBackendName(name) == AttentionBackendName.NATIVE


class _Functional(types.ModuleType):
    """Stands in for torch.nn.functional in a processor's globals."""

    def __getattr__(self, name: str) -> Any:
        return getattr(F, name)


def _restore(module: Any, mine: object, old: object) -> None:
    if module.processor is mine:  # somebody else's processor is left alone
        module.processor = old
