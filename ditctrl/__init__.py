"""DiTCtrl: tuning-free multi-prompt longer video generation (arXiv 2412.18597), as small parts on top of control.

    segments = ditctrl.Segments.scaled(prompts=2, length=13)
    method = ditctrl.MultiPrompt(loop, segments, embeddings, guidance, sharing)

Names are imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ditctrl.method import MultiPrompt
    from ditctrl.segment import Segments
    from ditctrl.sharing import Window, share_previous

_HOME = {"MultiPrompt": "method", "Segments": "segment", "Window": "sharing", "share_previous": "sharing"}

__all__ = ["MultiPrompt", "Segments", "Window", "share_previous"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ditctrl' has no attribute {name!r}")
    value = getattr(import_module(f"ditctrl.{_HOME[name]}"), name)
    globals()[name] = value
    return value
