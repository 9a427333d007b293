"""How long each prompt of a story is shown, as recipes say it."""

from __future__ import annotations

import json
import re

import pytest

from ditctrl.duration import shown
from recipes.job import prepare
from recipes.language import parse
from tests.recipes.line import main_ok, refused

TWO = ["a red circle moving right", "a blue square moving left"]
TIMED = [f"[0:00-0:04] {TWO[0]}", f"[0:04-0:10] {TWO[1]}"]


def story(*sets, prompts=TWO):
    return parse.load("ditctrl", sets, {"prompts": prompts})


def test_durations_are_seconds_or_frames_and_become_whole_segments():
    """The miniature has 5 latent frames of 4 pixel frames; 8 frames per second."""
    plain = prepare(story()).segments
    assert plain.repeats == ()
    seconds = prepare(story("segments.durations=[4, 6]")).segments
    assert seconds == prepare(story("segments.durations=[32, 48]", "segments.unit=frames")).segments
    assert seconds == prepare(story("segments.durations=[2, 3]", "output.fps=16")).segments
    edges = [[max(0, 4 * latent - 3) / 8 for latent in span] for span in shown(seconds)]  # the first is one frame
    lengths = [stop - start for start, stop in edges]
    assert all(abs(length - want) <= seconds.stride * 4 / 8 / 2 for length, want in zip(lengths, (4, 6), strict=True))
    assert seconds.repeats > (1, 1)


def test_times_before_the_prompts_are_durations_and_no_words():
    recipe = story(prompts=TIMED)
    assert recipe.prompts == TWO
    assert recipe == story("segments.durations=[4.0, 6.0]")
    named = parse.load("ditctrl", (), {"prompts": dict(zip("ab", TIMED, strict=True))})
    assert named.prompts == dict(zip("ab", TWO, strict=True))


def test_a_recipe_without_segments_keeps_its_prompts_as_they_are():
    recipe = parse.load("record", (), {"prompts": [TIMED[0]]})
    assert recipe.prompts == [TIMED[0]]


def test_more_middle_segments():
    three = prepare(story("segments.middle=2", prompts=[*TWO, TWO[0]])).segments
    assert three.repeats == (1, 3, 1)


def test_the_dry_run_says_what_was_rounded(capsys):
    main_ok(["run", "ditctrl", "--dry-run", "--format", "json", "--set", "segments.durations=[4, 6]"])
    said = json.loads(capsys.readouterr().out)
    (_, first), (start, stop) = (
        map(float, re.findall(r"(\S+) to (\S+) s", line)[0]) for line in said["prompts are shown in"]
    )
    assert first == start
    assert stop == pytest.approx(said["video frames"] / 8, abs=0.05)
    assert [line[-11:] for line in said["prompts are shown in"]] == ["(asked 4.0)", "(asked 6.0)"]


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (["segments.durations=[4, 6, 2]"], "one positive number for each of the 2 prompts. Got"),
        (["segments.durations=[4, -6]"], "greater than 0"),
        (["segments.durations=[4, 6]", "segments.middle=1"], "must have one of middle, times, durations and isolated"),
        (["prompts=['[0:00-0:04] a red circle', 'a blue square']"], "Either all prompts must have times or none"),
        (["prompts=['[0:00-0:04] a red circle', '[0:05-0:06] a blue square']"], "must follow each other"),
        (
            ["prompts=['[0:00-0:04] a red circle', '[0:04-0:06] a blue square']", "segments.durations=[1, 2]"],
            "must have no durations beside them",
        ),
    ],
)
def test_durations_that_do_not_fit_are_one_sentence(capsys, sets, said):
    line = ["run", "ditctrl", "--dry-run", *(part for one in sets for part in ("--set", one))]
    assert said in refused(capsys, line, 2)
