"""Numbers that say how good a video of one or more prompts is. What each means is said in `ditctrl.metric` and
`ditctrl.motion`.

    numbers = evaluate(Run("runs/story"), features.load("miniature"))
    found = scores(frames, ["a red circle", "a blue circle"], [(0, 20), (20, 37)], features)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from ditctrl import metric
from ditctrl.metric import Span
from ditctrl.motion import motion
from probe.film import Frames
from probe.mask import Mask
from probe.store import Run
from recipes import footage
from recipes.features import Features
from recipes.language import parse

GREY = 127
"""Around an object whose appearance is compared."""


@dataclass(frozen=True)
class Scores:
    """`numbers` by name, None where one is not defined; `turns` says of each change of prompt where it was meant and
    where it was found.

    frames: how many. cscv: steadiness of the features. still: whether the video hardly moves, so that cscv says
    nothing. motion: percent of the shorter side per frame. smoothness: of the motion, 0 to 1. text: cosine of frames
    and the prompts shown. text_margin: how much nearer than the nearest other prompt. turn_error: seconds between where
    the features turn and where they should, without sign. turn_width: seconds of a turn. turn_sharpness: 1 for a cut.
    turn_contrast: how unlike the sides are. object, background: consistency inside and outside of a mask. The numbers
    of turns are means over turns.
    """

    numbers: dict[str, Any]
    turns: list[dict[str, Any]] = field(default_factory=list)


def evaluate(run: Run, features: Features, words: Sequence[str] | None = None) -> dict[str, Any]:
    """The numbers of a run's video; see `Scores`. `words` name the object whose recorded maps are its mask; None are
    the words that the recipe records by name.

    Raises:
        StoreError: the run has no video, or a damaged one.
        WordError: a word was not recorded.
    """
    return judge(run, features, words).numbers


def judge(run: Run, features: Features, words: Sequence[str] | None = None) -> Scores:
    """As `evaluate`, with every turn."""
    shot = footage.of_run(run)
    named = _recorded_by_name(run) if words is None else words
    inside = footage.object_mask(run, named, shot.frames) if named else None
    return scores(shot.frames, shot.prompts, shot.spans, features, shot.fps, inside)


def scores(
    frames: Frames,
    prompts: Sequence[str],
    spans: Sequence[Span],
    features: Features,
    fps: float = 8,
    inside: Mask | None = None,
) -> Scores:
    """Scores of frames uint8 [F, H, W, 3] that show each prompt in its span (start, stop), in frames; a gap between two
    spans is a transition. `inside`, bool [F, H, W], is where the object is; frames without it are left out.

    Raises:
        UsageError: spans that do not follow each other.
    """
    pooled, embedded = features.images(frames)
    names = list(dict.fromkeys(prompts))  # a prompt that comes back is the same one
    share = metric.shares(spans, len(frames)) @ np.array([[text == name for name in names] for text in prompts])
    texts = features.texts(names)
    moved = motion(frames) if len(frames) > 2 else None
    turns = _turns(embedded, spans, fps)
    numbers: dict[str, Any] = {
        "frames": len(frames),
        "cscv": metric.cscv(pooled) if len(frames) > 1 else None,
        "still": moved.still if moved else None,
        "motion": moved.degree if moved else None,
        "smoothness": moved.smoothness if moved else None,
        "text": float(metric.text_similarity(embedded, texts, share).mean()),
        "text_margin": float(metric.text_margin(embedded, texts, share).mean()),
        "turn_error": _mean([abs(one["found_s"] - one["meant_s"]) for one in turns]),
        "turn_width": _mean([one["width_s"] for one in turns]),
        "turn_sharpness": _mean([one["sharpness"] for one in turns]),
        "turn_contrast": _mean([one["contrast"] for one in turns]),
        "object": _consistency(frames, inside, features, GREY) if inside is not None else None,
        "background": _consistency(frames, ~inside, features) if inside is not None else None,
    }
    return Scores(_defined(numbers), [_defined(one) for one in turns])


def _turns(embedded: Any, spans: Sequence[Span], fps: float) -> list[dict[str, Any]]:
    """Places in frames and, ending in _s, in seconds; none where a prompt is shown for less than two frames."""
    if any(stop - start < 2 for start, stop in spans):
        return []
    rows = []
    for number, (one, other) in enumerate(pairwise(spans), 1):
        found, meant = metric.turn(embedded, one, other), (one[1] + other[0]) / 2
        rows.append(
            {
                "turn": f"{number} to {number + 1}",
                "meant": meant,
                "found": found.frame,
                "meant_s": meant / fps,
                "found_s": found.frame / fps,
                "width_s": found.width / fps,
                "sharpness": found.sharpness,
                "contrast": found.contrast,
            }
        )
    return rows


def _consistency(frames: Frames, inside: Mask, features: Features, grey: int | None = None) -> float | None:
    there = inside.any((1, 2))
    if there.sum() < 2:
        return None
    return metric.consistency(features.images(metric.cut_out(frames[there], inside[there], grey))[1])


def _recorded_by_name(run: Run) -> Sequence[str]:
    """The words a recipe names under record.words; none for a recipe that names none, or a run of probe.record."""
    if "recipe" not in run.info:
        return ()
    record = parse.load(str(run.path / "recipe.yaml")).record
    return record.words if record else ()


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else math.nan


def _defined(values: dict[str, Any]) -> dict[str, Any]:
    """None for NaN."""
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in values.items()}
