"""What the arms of a sweep gave: means, their intervals, and differences within pairs. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from recipes.study import interval
from recipes.sweep_store import Row

_Values = Mapping[tuple[str, int], float]
"""A number of each run of one arm, by (group, seed)."""


def summary(rows: Iterable[Row], reference: str) -> list[dict[str, Any]]:
    """For each metric the mean of every arm, and of the differences arm - reference within pairs: runs of one group and
    seed that both arms have.

    Each mean has a 95 % bootstrap interval over groups, whose seeds are averaged first, since runs of one group are
    alike; over seeds where there is one group; none where there is one run.
    """
    found: dict[str, dict[str, dict[tuple[str, int], float]]] = {}
    for row in rows:
        for metric, value in row.metrics.items():
            found.setdefault(metric, {}).setdefault(row.arm, {})[row.group, row.seed] = value
    return [
        {
            "metric": metric,
            "arms": {arm: _spread(values) for arm, values in arms.items()},
            "reference": reference,
            "differences": _differences(arms, reference),
        }
        for metric, arms in found.items()
    ]


def _differences(arms: Mapping[str, _Values], reference: str) -> dict[str, dict[str, Any]]:
    there = arms.get(reference, {})
    pairs = {
        arm: {key: value - there[key] for key, value in values.items() if key in there}
        for arm, values in arms.items()
        if arm != reference
    }
    return {arm: _spread(values) for arm, values in pairs.items() if values}


def _spread(values: _Values) -> dict[str, Any]:
    by_seed = len({group for group, _ in values}) == 1
    units: dict[str | int, list[float]] = {}
    for (group, seed), value in values.items():
        units.setdefault(seed if by_seed else group, []).append(value)
    means = [fmean(unit) for unit in units.values()]
    said = interval(means).facts() if len(means) > 1 else {"mean": means[0], "low": None, "high": None}
    return {**said, "runs": len(values)}


def counted(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """For tables: how many runs of each arm are done and how long one takes."""
    given = list(rows)
    done = Counter(row.arm for row in given if row.status == "done")
    seconds = {arm: [row.seconds for row in given if row.arm == arm and row.seconds is not None] for arm in done}
    return [
        {
            "arm": arm,
            "done": str(done[arm]),
            "failed": str(count - done[arm]),
            "seconds per run": f"{fmean(seconds[arm]):.1f}" if seconds.get(arm) else "",
        }
        for arm, count in Counter(row.arm for row in given).items()
    ]


def by_arm(found: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """For tables: a line per metric, a column per arm."""
    arms = list(dict.fromkeys(arm for one in found for arm in one["arms"]))
    return [{"metric": one["metric"], **{arm: _cell(one["arms"].get(arm)) for arm in arms}} for one in found]


def by_difference(found: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """For tables: the differences to the reference, a line per metric; none without a second arm."""
    arms = list(dict.fromkeys(arm for one in found for arm in one["differences"]))
    if not arms:
        return []
    return [{"metric": one["metric"], **{arm: _cell(one["differences"].get(arm)) for arm in arms}} for one in found]


def _cell(spread: Mapping[str, Any] | None) -> str:
    if spread is None:
        return ""
    if spread["low"] is None or spread["low"] == spread["high"]:
        return f"{spread['mean']:.3f}"
    return f"{spread['mean']:.3f} [{spread['low']:.3f}, {spread['high']:.3f}]"
