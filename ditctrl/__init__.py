"""DiTCtrl: tuning-free multi-prompt longer video generation (arXiv 2412.18597), as small parts on top of control.

    segments, window = ditctrl.Segments.scaled(prompts=2, length=13), ditctrl.Window.scaled(steps=50, layers=30)
    traced = probe.trace(pipe, ditctrl.share_previous(segments, where=ditctrl.shared_where(window)))
    method = ditctrl.MultiPrompt(loop, segments, embeddings, negative, guidance, window, clock)

Sources are given as file and lines of the authors' code (TencentARC/DiTCtrl at f1348b5, folder sat/): SV is
sample_video.py, SA sgm/modules/diffusionmodules/sampling.py, DC dit_video_concat.py.

Names are imported on first use.
"""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from ditctrl.method import MultiPrompt
    from ditctrl.segment import Segments
    from ditctrl.sharing import Window, share_previous

__all__ = ["MultiPrompt", "Segments", "Window", "share_previous"]

__getattr__, __dir__, _ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "method": ["MultiPrompt"],
        "segment": ["Segments"],
        "sharing": ["Window", "share_previous"],
    },
)
