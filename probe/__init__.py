"""probe looks at attention: it records and serves every joint-attention call of a video diffusion transformer, and
changes nothing by itself.

    pipe = probe.load("miniature")
    run = probe.record(pipe, "a red circle moving right", words=["circle"], out="runs/first")
    run.word_map("circle", layer=3, step=10)

Names are imported on first use: reading a run needs no torch.
"""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from probe.errors import MmditError
    from probe.layout import Grid, TokenLayout
    from probe.models.load import load
    from probe.models.prove import prove
    from probe.plan import Handler, Plan, Stage
    from probe.readout.base import At, Readout
    from probe.readout.mass import RegionMass
    from probe.readout.word import WordMaps
    from probe.recorder import record
    from probe.region import Block, Region
    from probe.site import Branch, Progress, Site, Where, Which
    from probe.store import Run
    from probe.tracer import trace

__all__ = [
    "At",
    "Block",
    "Branch",
    "Grid",
    "Handler",
    "MmditError",
    "Plan",
    "Progress",
    "Readout",
    "Region",
    "RegionMass",
    "Run",
    "Site",
    "Stage",
    "TokenLayout",
    "Where",
    "Which",
    "WordMaps",
    "load",
    "prove",
    "record",
    "trace",
]

__getattr__, __dir__, _ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "errors": ["MmditError"],
        "layout": ["Grid", "TokenLayout"],
        "models.load": ["load"],
        "models.prove": ["prove"],
        "plan": ["Handler", "Plan", "Stage"],
        "readout.base": ["At", "Readout"],
        "readout.mass": ["RegionMass"],
        "readout.word": ["WordMaps"],
        "recorder": ["record"],
        "region": ["Block", "Region"],
        "site": ["Branch", "Progress", "Site", "Where", "Which"],
        "store": ["Run"],
        "tracer": ["trace"],
    },
)
