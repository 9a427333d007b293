"""control rewrites attention calls and owns the denoising loop.

    recolour = control.Transfer("kv", source=0, target=1, where=probe.Where(layers=slice(4, 6), steps=slice(1, 15)))

Inside a call: Transfer, Extend, Bias, Scale, Rotate, Fork, and what is made of them. Outside: Shift, Filter, Skip,
Guide, latents, masks, searches. Names are imported on first use.
"""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from control.adapter import Loop
    from control.address import Area, Found, Gate
    from control.bank import Bank
    from control.best_band import BestBand
    from control.bias import Bias, BiasFunction, BiasTable
    from control.closed_form import Fixed, Identity, MeanOf, Sharpest, Uniform, Within
    from control.concept import ConceptMask
    from control.constant import Constant
    from control.denoise import Lockstep, State
    from control.edit import Edit
    from control.extend import Extend
    from control.extract import ExtractMask
    from control.filter import Filter
    from control.fork import Fork
    from control.group import Subject, lamic, mask2dit
    from control.guide import Guide
    from control.latent import Blend, LatentEdit
    from control.match import Match
    from control.noise import LowPass, NoiseShuffle, Nudge
    from control.overlap import Windows
    from control.path import PathToIdentity
    from control.perturb import (
        BlurQuery,
        MaskRegion,
        identity_attention,
        sharpest_attention,
        uniform_attention,
        video_mass_to_self,
    )
    from control.reuse import Reuse
    from control.reweight import Reweight
    from control.rotate import Rotate
    from control.scale import Scale, Temper, head_router_factors, multipliers
    from control.schedule import dynamic_guidance
    from control.search import ablation, greedy, head_candidates, vitality
    from control.shift import Shift, Steering
    from control.sink import Sinks
    from control.skip import Skip
    from control.source import Itself, Peer, Stored
    from control.sparsify import Sparsify
    from control.strength import Ramp, Strength
    from control.transfer import Transfer
    from control.variant import Edited, Variant
    from control.window import Band, Window

__all__ = [
    "Area",
    "Band",
    "Bank",
    "BestBand",
    "Bias",
    "BiasFunction",
    "BiasTable",
    "Blend",
    "BlurQuery",
    "ConceptMask",
    "Constant",
    "Edit",
    "Edited",
    "Extend",
    "ExtractMask",
    "Filter",
    "Fixed",
    "Fork",
    "Found",
    "Gate",
    "Guide",
    "Identity",
    "Itself",
    "LatentEdit",
    "Lockstep",
    "Loop",
    "LowPass",
    "MaskRegion",
    "Match",
    "MeanOf",
    "NoiseShuffle",
    "Nudge",
    "PathToIdentity",
    "Peer",
    "Ramp",
    "Reuse",
    "Reweight",
    "Rotate",
    "Scale",
    "Sharpest",
    "Shift",
    "Sinks",
    "Skip",
    "Sparsify",
    "State",
    "Steering",
    "Stored",
    "Strength",
    "Subject",
    "Temper",
    "Transfer",
    "Uniform",
    "Variant",
    "Window",
    "Windows",
    "Within",
    "ablation",
    "dynamic_guidance",
    "greedy",
    "head_candidates",
    "head_router_factors",
    "identity_attention",
    "lamic",
    "mask2dit",
    "multipliers",
    "sharpest_attention",
    "uniform_attention",
    "video_mass_to_self",
    "vitality",
]

__getattr__, __dir__, _ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "adapter": ["Loop"],
        "address": ["Area", "Found", "Gate"],
        "bank": ["Bank"],
        "best_band": ["BestBand"],
        "bias": ["Bias", "BiasFunction", "BiasTable"],
        "closed_form": ["Fixed", "Identity", "MeanOf", "Sharpest", "Uniform", "Within"],
        "concept": ["ConceptMask"],
        "constant": ["Constant"],
        "denoise": ["Lockstep", "State"],
        "edit": ["Edit"],
        "extend": ["Extend"],
        "extract": ["ExtractMask"],
        "filter": ["Filter"],
        "fork": ["Fork"],
        "group": ["Subject", "lamic", "mask2dit"],
        "guide": ["Guide"],
        "latent": ["Blend", "LatentEdit"],
        "match": ["Match"],
        "noise": ["LowPass", "NoiseShuffle", "Nudge"],
        "path": ["PathToIdentity"],
        "perturb": [
            "BlurQuery",
            "MaskRegion",
            "identity_attention",
            "sharpest_attention",
            "uniform_attention",
            "video_mass_to_self",
        ],
        "reuse": ["Reuse"],
        "reweight": ["Reweight"],
        "rotate": ["Rotate"],
        "scale": ["Scale", "Temper", "head_router_factors", "multipliers"],
        "schedule": ["dynamic_guidance"],
        "search": ["ablation", "greedy", "head_candidates", "vitality"],
        "shift": ["Shift", "Steering"],
        "sink": ["Sinks"],
        "skip": ["Skip"],
        "source": ["Itself", "Peer", "Stored"],
        "sparsify": ["Sparsify"],
        "strength": ["Ramp", "Strength"],
        "transfer": ["Transfer"],
        "variant": ["Edited", "Variant"],
        "window": ["Band", "Window"],
        "overlap": ["Windows"],
    },
)
