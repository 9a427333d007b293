"""DiTCtrl: tuning-free multi-prompt longer video generation (arXiv 2412.18597), as small parts on top of control.

    segments, window = ditctrl.Segments.scaled(prompts=2, length=13), ditctrl.Window.scaled(steps=50, layers=30)
    traced = probe.trace(pipe, ditctrl.share_previous(segments, where=ditctrl.shared_where(window)))
    method = ditctrl.MultiPrompt(loop, segments, embeddings, negative, guidance, window, clock)

Mask-guided sharing adds `WordMasks(OfSegments(segments, [("cat", "dog")]), where)` and `keep_apart(masks, where)`.

Sources are given as file and lines of the authors' code (TencentARC/DiTCtrl at f1348b5, folder sat/): SV is
sample_video.py, SA sgm/modules/diffusionmodules/sampling.py, DC dit_video_concat.py, AR arguments.py, INF
configs/inference.yaml.

Names are imported on first use.
"""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from ditctrl.method import MultiPrompt
    from ditctrl.objects import OfPrompts, OfSegments
    from ditctrl.segment import Segments
    from ditctrl.sharing import Chunks, Window, share_previous, shared_where
    from ditctrl.wordmask import WordMasks, keep_apart

__all__ = [
    "Chunks",
    "MultiPrompt",
    "OfPrompts",
    "OfSegments",
    "Segments",
    "Window",
    "WordMasks",
    "keep_apart",
    "share_previous",
    "shared_where",
]

__getattr__, __dir__, _ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "method": ["MultiPrompt"],
        "objects": ["OfPrompts", "OfSegments"],
        "segment": ["Segments"],
        "sharing": ["Chunks", "Window", "share_previous", "shared_where"],
        "wordmask": ["WordMasks", "keep_apart"],
    },
)
