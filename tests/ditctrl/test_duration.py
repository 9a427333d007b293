"""How long prompts are shown: spans, whole segments for given durations, and times before the prompts."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest

from ditctrl.duration import lasting, shown, timed
from ditctrl.segment import Segments
from probe.errors import UsageError

EVERY = [
    Segments.scaled(prompts, length, transitions).middle(more)
    for prompts in (2, 3, 10)
    for length in (5, 13)
    for transitions in (0, 1, 2)
    for more in (0, 2)
]


@pytest.mark.parametrize(("more", "count", "frames"), [(0, 7, 37), (1, 8, 41), (3, 10, 49)])
def test_longer_middle_segments_are_those_of_the_authors(more, count, frames):
    """S = n + b (n - 1) + m (n - 2), and the middle prompt is repeated 1 + m times."""
    segments = Segments.scaled(3, 13).middle(more)
    assert (segments.count, segments.frames) == (count, frames)
    own = [prompt for prompt, mix in map(segments.condition, range(segments.count)) if mix == 0]
    assert own == [0, *[1] * (1 + more), 2]


@pytest.mark.parametrize("segments", EVERY, ids=str)
def test_the_spans_cover_the_video_and_hold_the_frames_where_a_prompt_counts_most(segments):
    """Against the blend itself: in each frame the prompt with the largest share of the weights."""
    spans = shown(segments)
    assert spans[0][0] == 0
    assert spans[-1][1] == segments.frames
    assert all(one[1] == other[0] for one, other in pairwise(spans))
    share = np.zeros((segments.prompts, segments.frames))
    rising = (np.arange(segments.length) + 0.5) * 2 / segments.length
    for at in range(segments.count):
        prompt, mix = segments.condition(at)
        weight = np.minimum(rising, 2 - rising)
        share[prompt, segments.window(at)] += (1 - mix) * weight
        if mix:
            share[prompt + 1, segments.window(at)] += mix * weight
    for frame, most in enumerate(share.argmax(0)):
        inside = next(i for i, (start, stop) in enumerate(spans) if start <= frame + 0.5 < stop)
        tie = np.isclose(share[inside, frame], share[most, frame])
        assert inside == most or tie or min(abs(frame + 0.5 - edge) for edge in spans[inside]) <= segments.stride / 2


@pytest.mark.parametrize("segments", EVERY, ids=str)
def test_durations_come_out_to_half_a_stride_or_at_their_least(segments):
    asked = [7.0 + 11 * (i % 3) for i in range(segments.prompts)]
    made = lasting(segments, asked)
    for number, (want, (start, stop)) in enumerate(zip(asked, shown(made), strict=True)):
        short = made.repeats[number] == 1 and stop - start > want
        assert short or abs(stop - start - want) <= made.stride / 2
    assert lasting(made, [stop - start for start, stop in shown(made)]) == made


@pytest.mark.parametrize(
    "asked", [[5.0], [5.0, 0.0, 1.0], [5.0, -1.0, 1.0], [5.0, math.nan, 1.0], [1.0, 1.0, math.inf]]
)
def test_durations_are_one_positive_number_for_each_prompt(asked):
    with pytest.raises(UsageError, match="one positive number for each of the 3 prompts"):
        lasting(Segments.scaled(3, 13), asked)


def test_times_are_taken_off_the_prompts():
    given = ["[0:00-0:03] a red circle", " [0:03 - 1:05.5]a blue\nsquare"]
    assert timed(given) == (["a red circle", "a blue\nsquare"], [3.0, 62.5])
    assert timed(["a red circle", "a [0:03] mark"]) == (["a red circle", "a [0:03] mark"], None)


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        (["[0:00-0:03] a", "b"], "Either all prompts must have times or none. Got 'b'"),
        (["[0:03-0:03] a", "[0:03-0:04] b"], "must end after it begins"),
        (["[0:00-0:03] a", "[0:05-0:04] b"], "must end after it begins"),
        (["[0:00-0:03] a", "[0:02-0:04] b"], "Got '.*b' after one that ends at 0:03. Begin it at 0:03"),
        (["[0:00-1:03.5] a", "[1:04-1:05] b"], "ends at 1:03.50"),
        (["[0:01-0:03] a", "[0:03-0:04] b"], "must begin at 0:00"),
    ],
)
def test_times_that_do_not_fit_are_refused(prompts, said):
    with pytest.raises(UsageError, match=said):
        timed(prompts)
