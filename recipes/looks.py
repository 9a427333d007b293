"""From what a recipe records to the readouts that record it."""

from __future__ import annotations

from collections.abc import Collection

from probe.readout.base import Readout
from probe.readout.column import ColumnMass
from probe.readout.entropy import Entropy, LogNormaliser
from probe.readout.frame import FrameMass
from probe.readout.keep import KeepQK
from probe.readout.locality import Locality
from probe.readout.mass import RegionMass
from probe.readout.region_map import SpatialMap, TemporalMap, TextMap
from probe.readout.settling import Settling
from probe.readout.similarity import Similarity
from probe.readout.sink import Sinks
from probe.readout.sparsity import Sparsity
from probe.readout.token import TokenMass
from probe.readout.word import Direction, WordMaps
from probe.site import JOINT, Branch, Where, Which
from probe.store_record import REGIONS
from recipes.language.recipe import Record

MOST_WORDS = 16
"""Word maps of a run that names no words."""

LOOKS: dict[str, type[Readout]] = {
    "frames": FrameMass,
    "tokens": TokenMass,
    "entropy": Entropy,
    "lse": LogNormaliser,
    "columns": ColumnMass,
    "sinks": Sinks,
    "sparsity": Sparsity,
    "locality": Locality,
    "settling": Settling,
}


def readouts(record: Record, where: Where, steps: int, layers: int, kinds: Collection[str]) -> tuple[Readout, ...]:
    """The readouts of a run of `steps` steps on a model of `layers` layers with attention of `kinds`.

    A model whose text does not look at the video (Wan) has no `tv` maps: they are left out.
    """
    alone = not JOINT & set(kinds)
    directions: list[Direction] = ["vt"] if alone else list(record.directions)
    maps = WordMaps(*record.words, where=where, directions=directions, per_head=record.heads == "each", most=MOST_WORDS)
    found: list[Readout] = [maps]
    found += [RegionMass(where=where)] if record.mass else []
    found += [_look(name, where) for name in dict.fromkeys(record.readouts) if name not in REGIONS]
    pairs = [(steps // 2, layers // 2)] if record.keep_qk == "auto" else record.keep_qk
    return (*found, *([KeepQK(pairs, where=Where(branches=where.branches))] if pairs else []))


def region_maps(
    record: Record, where: Where, frame: int | None, kinds: Collection[str]
) -> tuple[TextMap | SpatialMap | TemporalMap, ...]:
    """The region maps that a record asks for; `frame` is that of the spatial one.

    Text on text is left out where text does not attend (Wan).
    """
    each = record.heads == "each"
    made = {
        "text_text": TextMap(where=where, per_head=each),
        "spatial": SpatialMap(where=where, per_head=each, frame=frame),
        "temporal": TemporalMap(where=where, per_head=each),
    }
    alone = not JOINT & set(kinds)
    return tuple(made[name] for name in REGIONS if name in record.readouts and not (alone and name == "text_text"))


def _look(name: str, where: Where) -> Readout:
    """A readout by its name; similarity is that of every further prompt with the first one, within the video."""
    if name == "similarity":
        return Similarity(_further, Which(prompt=0, guided=True), where, keys="video")
    return LOOKS[name](where=where)


def _further(branch: Branch) -> bool:
    """The conditional branch of a prompt that is not the first."""
    return branch.guided and branch.prompt > 0
