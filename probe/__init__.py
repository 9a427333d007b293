"""probe looks at attention: it records and serves every joint-attention call of a video diffusion transformer, and
changes nothing by itself.

    pipe = probe.load("miniature")
    run = probe.record(pipe, "a red circle moving right", words=["circle"], out="runs/first")
    run.word_map("circle", layer=3, step=10)

Names are imported on first use: reading a run needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from probe.errors import MmditError
    from probe.layout import Grid, TokenLayout
    from probe.models.load import load
    from probe.models.prove import prove
    from probe.plan import Handler, Plan, Stage
    from probe.readout.mass import RegionMass
    from probe.readout.word import WordMaps
    from probe.recorder import record
    from probe.region import Block, Region
    from probe.site import Branch, Progress, Site, Where, Which
    from probe.store import Run
    from probe.tracer import trace

_HOME = {
    "MmditError": "errors",
    "Grid": "layout",
    "TokenLayout": "layout",
    "Region": "region",
    "Block": "region",
    "Branch": "site",
    "Progress": "site",
    "Site": "site",
    "Where": "site",
    "Which": "site",
    "Handler": "plan",
    "Plan": "plan",
    "Stage": "plan",
    "WordMaps": "readout.word",
    "RegionMass": "readout.mass",
    "Run": "store",
    "load": "models.load",
    "prove": "models.prove",
    "record": "recorder",
    "trace": "tracer",
}

__all__ = [
    "Block",
    "Branch",
    "Grid",
    "Handler",
    "MmditError",
    "Plan",
    "Progress",
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


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'probe' has no attribute {name!r}")
    value = getattr(import_module(f"probe.{_HOME[name]}"), name)
    globals()[name] = value
    return value
