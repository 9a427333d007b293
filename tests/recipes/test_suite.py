"""Prompt suites: the shipped ones, the format and its errors, and the files of MTVBench."""

from __future__ import annotations

import difflib
import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from probe.errors import UsageError
from probe.word import words_of
from recipes import scene, suite

ROOT = Path(__file__).parents[2]
KINDS = ["background", "subject", "camera", "style", "lighting", "location", "speed", "emotion", "clothing", "action"]
WORLD = ["color", "shape", "direction", "background", "appear", "disappear", "two objects"]
GROUP = """
  - id: one
    kind: color
    prompts: [a red ball, a blue ball]
    objects: ball
"""


def written(tmp_path, groups, name="mine.yaml"):
    file = tmp_path / name
    file.write_text(f"schema_version: 1\nname: mine\ngroups:{groups}", encoding="utf-8")
    return str(file)


@pytest.fixture(scope="module")
def transitions():
    return suite.load("transitions")


@pytest.fixture(scope="module")
def miniature():
    return suite.load("miniature")


def test_the_shipped_suites_have_enough_of_every_kind(transitions, miniature):
    assert suite.names() == ("miniature", "transitions")
    assert list(transitions.kinds) == KINDS
    assert min(transitions.kinds.values()) >= 13
    assert list(miniature.kinds) == WORLD
    assert min(miniature.kinds.values()) >= 8
    assert len(transitions.groups) >= 130


@pytest.mark.parametrize("name", ["transitions", "miniature"])
def test_no_group_comes_twice_and_each_names_its_objects(name):
    groups = suite.load(name).groups
    assert max(Counter(tuple(group.prompts) for group in groups).values()) == 1
    for group in groups:
        assert len(set(group.prompts)) == len(group.prompts), group.id
        assert group.objects, group.id
        assert group.id.startswith(group.kind.split()[0]), group.id


def test_the_wording_of_a_group_changes_only_in_part(transitions):
    for group in transitions.groups:
        for one, other in pairwise(group.prompts):
            alike = difflib.SequenceMatcher(None, words_of(one), words_of(other)).ratio()
            assert alike > 0.4, group.id
        for prompt in group.prompts:
            assert prompt.endswith("."), group.id
            assert "the same" not in prompt.lower(), group.id
            assert 5 <= len(words_of(prompt)) <= 40, group.id  # far below 226 tokens


def test_the_prompts_of_the_miniature_show_what_they_say(miniature):
    vocabulary = json.loads((ROOT / "data/miniature/tokenizer/tokenizer.json").read_text(encoding="utf-8"))["model"]
    known = {piece.removeprefix("▁") for piece, _ in vocabulary["vocab"]}
    for group in miniature.groups:
        assert group.truth, group.id
        for prompt, truth in zip(group.prompts, group.truth, strict=True):
            assert set(prompt.split()) <= known, group.id
            assert scene.parse(prompt) == (truth.things, truth.background), group.id


def test_the_kind_of_a_miniature_group_is_what_changes(miniature):
    """Color, shape and direction: that one word of the one thing; appear and disappear: how many things there are."""
    for group in miniature.groups:
        for one, other in pairwise(group.truth):
            counts = (len(one.things), len(other.things))
            if group.kind in ("color", "shape", "direction"):
                places = [at for at, (a, b) in enumerate(zip(one.things[0], other.things[0], strict=True)) if a != b]
                assert places == [["color", "shape", "direction"].index(group.kind)], group.id
                assert one.background == other.background, group.id
            elif group.kind == "background":
                assert one.things == other.things, group.id
                assert one.background != other.background, group.id
            else:
                assert counts == {"appear": (1, 2), "disappear": (2, 1), "two objects": (2, 2)}[group.kind], group.id


def test_one_object_stands_for_all_prompts(tmp_path):
    (group,) = suite.load(written(tmp_path, GROUP)).groups
    assert group.objects == ["ball", "ball"]
    several = GROUP.replace("objects: ball", "objects: [red ball, blue ball]\n    durations: [2, 3.5]")
    (group,) = suite.load(written(tmp_path, several)).groups
    assert (group.objects, group.durations) == (["red ball", "blue ball"], [2, 3.5])


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            "objects: ball",
            "objects: box",
            "line 7: objects of one must be words of their prompts. Got 'box' for 'a red",
        ),
        ("objects: ball", "objects: [ball]", "line 7: objects of one must be as many as its prompts, 2. Got 1"),
        ("objects: ball", "durations: [1, 2, 3]", "durations of one must be as many as its prompts, 2. Got 3"),
        ("objects: ball", "durations: [1, 0]", "groups.0.durations.1 must be greater than 0. Got 0"),
        ("[a red ball, a blue ball]", "[a red ball]", "List should have at least 2 items after validation, not 1"),
        ("kind: color", "knd: color", "every key must be known. Got groups.0.knd"),
        ("id: one", "id: ../up", "groups.0.id must be right: String should match pattern"),
        (
            "objects: ball",
            "truth: [{things: [[red, ball, up]]}, {things: [[blue, circle, up]]}]",
            "truth of one must be of the miniature's world. Got ball. Take one of circle, square, triangle",
        ),
        ("objects: ball", "objects: ball\n  - {id: One, kind: x, prompts: [a, b]}", "an id of its own. Got One again"),
    ],
)
def test_an_error_names_the_file_and_the_entry(tmp_path, old, new, said):
    with pytest.raises(UsageError) as error:
        suite.load(written(tmp_path, GROUP.replace(old, new)))
    assert str(error.value).startswith("mine.yaml, line")
    assert said in str(error.value)


def test_an_unknown_suite_is_refused_with_the_nearest():
    with pytest.raises(UsageError, match="Got miniatur. Did you mean miniature?"):
        suite.load("miniatur")


def test_a_selection_takes_from_each_kind_in_turn():
    few = suite.chosen(suite.Selection(name="miniature", limit=9))
    assert [group.kind for group in few] == ["color", "color", "shape", "shape", *WORLD[2:]]
    two = suite.chosen(suite.Selection(name="miniature", kinds=["appear", "shape"], limit=3))
    assert [group.id for group in two] == ["shape-1", "shape-2", "appear-1"]
    assert suite.chosen(suite.Selection.model_validate("miniature")) == suite.load("miniature").groups
    with pytest.raises(UsageError, match="A kind must be one of color, shape, .*Got colour"):
        suite.chosen(suite.Selection(name="miniature", kinds=["colour"]))


LINES = "\n".join(
    [
        "   A lamp glows on a desk.  ",
        "   A lamp flickers on a desk.  ",
        "###",
        "A door opens.",
        "A door stands open.",
        "A door closes.",
        "###",
        "",
    ]
)
ENTRIES = {
    "0": {"video": "V_1.mp4/video_1.mp4", "prompts": ["A lamp glows on a desk.", "A lamp flickers on a desk."]},
    "1": {"video": "V_2.mp4/video_2.mp4", "prompts": ["A door opens.", "A door stands open.", "A door closes."]},
}  # fmt: skip


def test_both_files_of_mtvbench_give_the_same_groups(tmp_path):
    (tmp_path / "p2.txt").write_text(LINES, encoding="utf-8")
    (tmp_path / "p2.json").write_text(json.dumps(ENTRIES), encoding="utf-8")
    text, entries = (suite.load(str(tmp_path / name)).groups for name in ("p2.txt", "p2.json"))
    assert text == entries
    assert [(group.id, group.kind, len(group.prompts)) for group in text] == [
        ("p2-1", "mtvbench", 2),
        ("p2-2", "mtvbench", 3),
    ]
    assert text[0].prompts == ENTRIES["0"]["prompts"]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("p.txt", "", "must hold groups of prompts. Got none in p.txt"),
        ("p.txt", "a\nb\n###\nc", "p.txt, group 2: a group must have two prompts or more. Got 1"),
        ("p.json", "{", "must be JSON. Got p.json"),
        ("p.json", "[]", "p.json must map numbers to groups"),
        ("p.json", '{"x": {"prompts": ["a", "b"]}}', "p.json: the keys of groups must be numbers from 0 on. Got 'x'"),
        ("p.json", '{"0": {"prompts": ["a", ""]}}', "p.json, entry 0: prompts must be a list of texts"),
        ("p.json", '{"0": {"prompts": ["a", "b"]}, "00": {"prompts": ["a", "b"]}}', "Got one twice"),
    ],
)
def test_a_bad_file_of_mtvbench_is_one_sentence(tmp_path, name, text, said):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(UsageError) as error:
        suite.load(str(tmp_path / name))
    assert said in str(error.value)
