"""control rewrites attention calls and owns the denoising loop.

    recolour = control.Transfer("kv", source=0, target=1, where=probe.Where(layers=slice(4, 6), steps=slice(1, 15)))

Names are imported on first use.
"""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from control.adapter import Loop
    from control.denoise import Guided, State
    from control.schedule import dynamic_guidance
    from control.transfer import Transfer

__all__ = ["Guided", "Loop", "State", "Transfer", "dynamic_guidance"]

__getattr__, __dir__, _ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "adapter": ["Loop"],
        "denoise": ["Guided", "State"],
        "schedule": ["dynamic_guidance"],
        "transfer": ["Transfer"],
    },
)
