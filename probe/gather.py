"""From what readouts collected in one step to the record of a segment, and which readouts can share one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from probe.errors import UsageError
from probe.readout.base import Readout
from probe.readout.region_map import RegionMap
from probe.readout.word import WordMaps
from probe.site import Branch
from probe.word import Prompt

TABLES = ("mass", "frames", "columns", "token_mass")

Found = Mapping[int, Mapping[str, Any]]
"""What a readout collected for one step and branch, by layer and kind of attention."""


def refuse_unrecordable(readouts: Sequence[Readout]) -> None:
    """What cannot be told apart in a step file.

    Raises:
        UsageError: a readout of some heads only, both halves of guidance, two readouts of one place in the file, or two
            that give one name to different numbers.
    """
    for readout in readouts:
        if readout.where.heads is not None:
            raise UsageError(
                f"A recorded readout must keep all heads, so that they can be read by number. Got {readout} with heads "
                f"{readout.where.heads}. Leave out heads."
            )
    chosen = [readout.where.branches for readout in readouts]
    if len({guided for one in chosen for guided in (True, False) if one is None or one(Branch(guided=guided))}) > 1:
        raise UsageError(
            "Readouts of one record must see one half of guidance. Got both. Record the conditional half by leaving "
            "out branches, and the other in a run of its own with Where(branches=Which(guided=False))."
        )
    for one, other in combinations(readouts, 2):
        if one.stored and one.stored == other.stored:
            raise UsageError(
                f"A record must have one readout for its {one.stored}. Got {one} and {other}. Leave one out."
            )
        shared = sorted(set(one.definitions) & set(other.definitions))
        if shared and not _alike(one, other):
            raise UsageError(
                f"A metric must have one meaning in a record. Got {shared[0]} from {one} and {other} with different "
                "options. Record one of them in a run of its own."
            )


def _alike(one: Readout, other: Readout) -> bool:
    """Whether two readouts look at the same evaluations with the same options, as far as both have them."""
    mine, yours = ({n: v for n, v in vars(r).items() if not n.startswith("_")} for r in (one, other))
    options = (mine.keys() & yours.keys()) - {"where", "values", "layouts", "kinds"}
    here, there = one.where, other.where
    return (here.turns, here.kinds) == (there.turns, there.kinds) and all(mine[n] == yours[n] for n in options)


def gather(readouts: Sequence[Readout], step: int, branch: Branch) -> dict[str, Any]:
    """The fields of a SegmentRecord that readouts fill.

    The kind of a layer is that of its attention that sees the text, if it was read. A readout that cannot see it keeps
    its own beside. A metric of the layer's second attention is called `<name>_self` where the name is taken.

    Raises:
        UsageError: readouts that share a file look at different layers.
    """
    seen = {readout: found for readout in readouts if (found := _of(readout, step, branch))}
    stacked = {readout: found for readout, found in seen.items() if readout.stored != "qk"}
    kinds = _kinds(stacked)
    _refuse_layers(stacked, set(kinds))
    tables = {r.stored: r for r in stacked if r.stored in TABLES}
    metrics, info, others = _metrics(stacked, kinds)
    regions = {r.stored: r for r in stacked if isinstance(r, RegionMap)}
    others |= {name: kind for name, r in (tables | regions).items() if (kind := _other(r, stacked[r], kinds))}
    return {
        "layers": tuple(kinds),
        "kinds": tuple(kinds.values()),
        "metrics": metrics,
        "metric_info": info,
        "other_kinds": others,
        "qk": _kept(seen),
        **{n: _stack({at: r.table(value) for at, value in _main(stacked[r], kinds)}, kinds) for n, r in tables.items()},
        "regions": {name: _whole(dict(_main(stacked[r], kinds)), kinds) for name, r in regions.items()},
        "region_facts": {name: r.facts(r.layouts[branch]) for name, r in regions.items()},
        **_maps(stacked, branch, kinds),
    }


def tokens_of(prompts: Sequence[Prompt], branch: Branch, count: int) -> dict[str, Any]:
    """The first `count` tokens of the text a branch shows; none where the prompt is not what it shows."""
    if not branch.guided or branch.nearest >= len(prompts):
        return {"text": (), "id": np.zeros(0, int), "word": np.zeros(0, int), "is_pad": np.zeros(0, bool)}
    prompt = prompts[branch.nearest].first(count)
    return {
        "text": np.array(prompt.pieces),
        "id": np.array(prompt.ids),
        "word": np.array(prompt.word_of_token()),
        "is_pad": np.array(prompt.padding),
    }


def _of(readout: Readout, step: int, branch: Branch) -> Found:
    """Of several evaluations in a step, the first; attention that sees the text before self attention."""
    found: dict[int, dict[str, Any]] = {}
    for at in readout.at(step=step, branch=branch):
        found.setdefault(at.layer, {}).setdefault(at.kind, readout.values[at])
    return {layer: dict(sorted(kinds.items(), key=lambda item: item[0] == "self")) for layer, kinds in found.items()}


def _kinds(stacked: Mapping[Readout, Found]) -> dict[int, str]:
    """The recorded layers and their kinds of attention, in order."""
    pairs = {(layer, kind) for found in stacked.values() for layer, kinds in found.items() for kind in kinds}
    return dict(sorted(pairs, key=lambda pair: (pair[0], pair[1] != "self")))


def _refuse_layers(stacked: Mapping[Readout, Found], layers: set[int]) -> None:
    """A layer may be missing only where it has no attention of a readout's kind; a map has nothing to show there."""
    asked = [readout.where.layers for readout in stacked]
    for readout, found in stacked.items():
        if set(found) != layers and (
            isinstance(readout, WordMaps | RegionMap) or any(one != asked[0] for one in asked)
        ):
            raise UsageError(
                "Readouts of one run must be recorded in the same layers. Got different ones: "
                f"{', '.join(str(one) for one in stacked)}. Give them one where."
            )


def _main(found: Found, kinds: Mapping[int, str]) -> list[tuple[int, Any]]:
    """The values of the layers' own kind, or of the only kind a readout saw there."""
    return [(layer, by_kind.get(kinds[layer], next(iter(by_kind.values())))) for layer, by_kind in found.items()]


def _other(readout: Readout, found: Found, kinds: Mapping[int, str]) -> str | None:
    """The kind of a readout's values where it is not that of the layers."""
    return next((next(iter(one)) for layer, one in found.items() if kinds[layer] not in one), None)


def _stack(rows: Mapping[int, NDArray[Any]], layers: Mapping[int, str]) -> NDArray[np.float32]:
    """Rows by layer as one array [L, ...], NaN where a layer has none."""
    empty = np.full_like(next(iter(rows.values())), np.nan, np.float32)
    return np.stack([rows.get(layer, empty) for layer in layers])


def _whole(rows: Mapping[int, NDArray[np.float32]], layers: Mapping[int, str]) -> NDArray[np.float32]:
    """Rows by layer as one array [L, ...], where every layer has one."""
    return np.stack([rows[layer] for layer in layers])


def _metrics(
    stacked: Mapping[Readout, Found], kinds: Mapping[int, str]
) -> tuple[dict[str, NDArray[np.float32]], dict[str, str], dict[str, str]]:
    """Numbers per layer and head [L, H], their definitions, and the kinds that are not the layers', by name."""
    made, info, others = {}, {}, {}
    for own in (True, False):
        taken = set(made)
        for readout, found in stacked.items():
            for name, rows in _numbers(readout, found, kinds, own).items():
                label = name if own or name not in taken else f"{name}_self"
                made.setdefault(label, _stack(rows, kinds))
                info.setdefault(label, readout.definitions.get(name, ""))
                others |= {} if own else {label: "self"}
    return made, info, others


def _numbers(
    readout: Readout, found: Found, kinds: Mapping[int, str], own: bool
) -> dict[str, dict[int, NDArray[np.float32]]]:
    """Numbers [H] by name and layer, of the attention of the layers' own kind or of the other one."""
    rows: dict[str, dict[int, NDArray[np.float32]]] = {}
    for layer, by_kind in found.items():
        for value in (value for kind, value in by_kind.items() if (kind == kinds[layer]) == own):
            for name, numbers in readout.metrics(value).items():
                rows.setdefault(name, {})[layer] = numbers
    return rows


def _kept(seen: Mapping[Readout, Found]) -> dict[tuple[int, str], tuple[Any, Any]]:
    """Kept query and key by layer and kind."""
    kept = (found for readout, found in seen.items() if readout.stored == "qk")
    return {
        (layer, kind): (value["q"], value["k"])
        for found in kept
        for layer, by_kind in found.items()
        for kind, value in by_kind.items()
    }


def _maps(stacked: Mapping[Readout, Found], branch: Branch, kinds: Mapping[int, str]) -> dict[str, Any]:
    """Word maps by direction, their words, and what each frame gives to each word."""
    for readout, found in stacked.items():
        if isinstance(readout, WordMaps):
            rows = dict(_main(found, kinds))
            maps = {d: np.stack([rows[layer][d] for layer in kinds]) for d in readout.directions}
            return {
                "words": readout.words_of[branch],
                "maps": maps,
                "heads": "each" if readout.per_head else "mean",
                "word_frames": maps["vt"].mean((-1, -2)) if "vt" in maps else None,
            }
    return {"words": ()}
