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
    from probe import mask, measure
    from probe.errors import MmditError
    from probe.layout import Grid, TokenLayout
    from probe.likeness import similarity
    from probe.models.load import load
    from probe.models.prove import prove
    from probe.plan import Handler, Plan, Stage
    from probe.readout.base import At, Readout
    from probe.readout.column import ColumnMass
    from probe.readout.entropy import Entropy, LogNormaliser
    from probe.readout.feature import Correspondence, Features
    from probe.readout.frame import FrameMass
    from probe.readout.keep import KeepQK
    from probe.readout.kept import Blocks, FrameWindow, KeptMass, Tube
    from probe.readout.locality import Locality
    from probe.readout.mass import RegionMass
    from probe.readout.recovery import Recovery
    from probe.readout.region_map import SpatialMap, TemporalMap, TextMap
    from probe.readout.saliency import OutputSaliency
    from probe.readout.settling import Settling
    from probe.readout.similarity import Similarity
    from probe.readout.sink import Sinks
    from probe.readout.sparsity import Sparsity
    from probe.readout.token import TokenMass
    from probe.readout.word import WordMaps
    from probe.recorder import record
    from probe.region import Block, Region
    from probe.site import Branch, Progress, Site, Where, Which
    from probe.store import Run
    from probe.tracer import trace

__all__ = [
    "At",
    "Block",
    "Blocks",
    "Branch",
    "ColumnMass",
    "Correspondence",
    "Entropy",
    "Features",
    "FrameMass",
    "FrameWindow",
    "Grid",
    "Handler",
    "KeepQK",
    "KeptMass",
    "Locality",
    "LogNormaliser",
    "MmditError",
    "OutputSaliency",
    "Plan",
    "Progress",
    "Readout",
    "Recovery",
    "Region",
    "RegionMass",
    "Run",
    "Settling",
    "Similarity",
    "Sinks",
    "Site",
    "Sparsity",
    "SpatialMap",
    "Stage",
    "TemporalMap",
    "TextMap",
    "TokenLayout",
    "TokenMass",
    "Tube",
    "Where",
    "Which",
    "WordMaps",
    "load",
    "mask",
    "measure",
    "prove",
    "record",
    "similarity",
    "trace",
]

__getattr__, __dir__, _ = lazy_loader.attach(
    __name__,
    submodules=["mask", "measure"],
    submod_attrs={
        "errors": ["MmditError"],
        "layout": ["Grid", "TokenLayout"],
        "likeness": ["similarity"],
        "models.load": ["load"],
        "models.prove": ["prove"],
        "plan": ["Handler", "Plan", "Stage"],
        "readout.base": ["At", "Readout"],
        "readout.column": ["ColumnMass"],
        "readout.entropy": ["Entropy", "LogNormaliser"],
        "readout.feature": ["Correspondence", "Features"],
        "readout.frame": ["FrameMass"],
        "readout.keep": ["KeepQK"],
        "readout.kept": ["Blocks", "FrameWindow", "KeptMass", "Tube"],
        "readout.locality": ["Locality"],
        "readout.recovery": ["Recovery"],
        "readout.region_map": ["SpatialMap", "TemporalMap", "TextMap"],
        "readout.saliency": ["OutputSaliency"],
        "readout.settling": ["Settling"],
        "readout.similarity": ["Similarity"],
        "readout.sink": ["Sinks"],
        "readout.sparsity": ["Sparsity"],
        "readout.token": ["TokenMass"],
        "readout.mass": ["RegionMass"],
        "readout.word": ["WordMaps"],
        "recorder": ["record"],
        "region": ["Block", "Region"],
        "site": ["Branch", "Progress", "Site", "Where", "Which"],
        "store": ["Run"],
        "tracer": ["trace"],
    },
)
