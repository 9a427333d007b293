"""control rewrites attention calls and owns the denoising loop.

    recolour = control.Transfer("kv", source=0, target=1, where=probe.Where(layers=slice(4, 6), steps=slice(1, 15)))

Names are imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from control.adapter import Loop
    from control.denoise import Guided, State, denoise
    from control.schedule import dynamic_guidance
    from control.transfer import Transfer

_HOME = {
    "Guided": "denoise",
    "Loop": "adapter",
    "State": "denoise",
    "Transfer": "transfer",
    "dynamic_guidance": "schedule",
}

__all__ = ["Guided", "Loop", "State", "Transfer", "denoise", "dynamic_guidance"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'control' has no attribute {name!r}")
    value = getattr(import_module(f"control.{_HOME[name]}"), name)
    globals()[name] = value
    return value
