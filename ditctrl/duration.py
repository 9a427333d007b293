"""How long each prompt is shown: from frames or times to whole segments, and what came of it. No torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from math import floor

from ditctrl.segment import Segments
from probe.errors import UsageError

_TIMED = re.compile(r"\s*\[\s*(\d+):(\d{1,2}(?:\.\d+)?)\s*-\s*(\d+):(\d{1,2}(?:\.\d+)?)\s*\]\s*(.*)", re.DOTALL)


def shown(segments: Segments) -> list[tuple[float, float]]:
    """For each prompt the latent frames [start, stop) in which it counts most. A prompt begins and ends halfway between
    its own segments and those of its neighbours, in the middle of the transition, the first at 0, the last at the end.
    """
    own = [segments.condition(segment) for segment in range(segments.count)]
    middles = [segment * segments.stride + segments.length / 2 for segment in range(segments.count)]
    places = [
        [at for at, (which, mix) in zip(middles, own, strict=True) if which == prompt and not mix]
        for prompt in range(segments.prompts)
    ]
    turns = [(one[-1] + other[0]) / 2 for one, other in pairwise(places)]
    return list(pairwise([0.0, *turns, float(segments.frames)]))


def lasting(segments: Segments, frames: Sequence[float]) -> Segments:
    """Segments in which each prompt is shown for about `frames` latent frames: rounded to whole segments, one at least
    (two of a single prompt).

    Raises:
        UsageError: not one positive number for each prompt.
    """
    if len(frames) != segments.prompts or not all(0 < one < float("inf") for one in frames):
        raise UsageError(
            f"Durations must be one positive number for each of the {segments.prompts} prompts. Got {list(frames)}. "
            "Leave them out for equal ones."
        )
    few = 1 if segments.prompts > 1 else 2
    once = replace(segments, repeats=(few,) * segments.prompts)
    least = [stop - start for start, stop in shown(once)]
    more = [max(0, floor((asked - own) / segments.stride + 0.5)) for asked, own in zip(frames, least, strict=True)]
    return replace(segments, repeats=tuple(few + one for one in more))


def timed(prompts: Sequence[str]) -> tuple[list[str], list[float] | None]:
    """Texts and seconds of prompts like "[0:00-0:03] a red circle"; None for prompts without times.

    Raises:
        UsageError: only some have times, one is reversed or empty, or they do not follow each other without a gap.
    """
    found = [_TIMED.fullmatch(prompt) for prompt in prompts]
    if not any(found):
        return list(prompts), None
    texts, spans = [], []
    for prompt, match in zip(prompts, found, strict=True):
        if match is None:
            raise UsageError(
                f"Either all prompts must have times or none. Got {prompt!r} without. Write [0:00-0:03] before it."
            )
        start, stop = (60 * int(match[i]) + float(match[i + 1]) for i in (1, 3))
        if stop <= start:
            raise UsageError(f"The time of a prompt must end after it begins. Got {prompt!r}. Swap the two.")
        texts.append(match[5])
        spans.append((start, stop))
    for (_, stop), (start, _), prompt in zip(spans, spans[1:], prompts[1:], strict=False):
        if stop != start:
            raise UsageError(
                f"The times of prompts must follow each other. Got {prompt!r} after one that ends at {_clock(stop)}. "
                f"Begin it at {_clock(stop)}."
            )
    if spans[0][0]:
        raise UsageError(f"The first prompt must begin at 0:00. Got {prompts[0]!r}. Begin it there.")
    return texts, [stop - start for start, stop in spans]


def _clock(seconds: float) -> str:
    minutes, rest = divmod(seconds, 60)
    return f"{int(minutes)}:{rest:05.2f}".removesuffix(".00")
