"""LAMIC's and Mask2DiT's tables against rules written out token by token."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from control.group import Subject, lamic, mask2dit
from probe.errors import UsageError
from probe.region import frames, tokens, words
from probe.site import Branch, Where, Which
from tests.control.whole import attended, batch, double_call, output, position, served
from tests.probe.readout.calls import CROSS, JOINT, SELF

TIGHT = {"atol": 1e-6, "rtol": 1e-6}
LEFT, RIGHT = np.zeros((3, 2, 4), bool), np.zeros((3, 2, 4), bool)
LEFT[1:, :, 0], RIGHT[1:, :, 2:] = True, True
FIRST = Subject(words("red", "cat"), tokens(LEFT), frames(0))
SECOND = Subject(words("runs"), tokens(RIGHT))
WORDS = ["W", "T0", "T0", "T1", "W", "P", "P"]  # a red cat runs left; two of padding


def group(place, text):
    """The group of a token, as the table of LAMIC names it: its kind and its subject."""
    if place is None:
        return WORDS[text]
    f, _, x = place
    return "F0" if f == 0 else "R0" if x == 0 else "R1" if x >= 2 else "U"


def sees(row, column, stage):
    """The table of the paper, written as rules."""
    (row, i), (column, j) = (row[0], row[1:]), (column[0], column[1:])
    if "P" in (row, column):
        return True
    if (row, column) in (("W", "T"), ("T", "W"), ("W", "W"), ("W", "F"), ("F", "W"), ("U", "U")):
        return True
    if {row, column} in ({"T", "U"}, {"F", "U"}):
        return False
    if {row, column} in ({"W", "R"}, {"W", "U"}, {"R", "U"}):
        return stage == 2
    return i == j or (stage == 2 and row == column == "R")


def names(call, side):
    start, found = (call.layout.text_slice.start if side == "rows" or call.site.kind != "cross" else 0), []
    for at, place in enumerate(position(call, side)):
        found.append(group(place, at - start))
    return found


@pytest.mark.parametrize("settings", JOINT + SELF + CROSS, ids=str)
@pytest.mark.parametrize("stage", [1, 2])
def test_lamic_equals_its_rules(settings, stage):
    call = double_call(**settings)
    seen = [[sees(a, b, stage) for b in names(call, "columns")] for a in names(call, "rows")]
    bias = torch.where(torch.tensor(seen), 0.0, -math.inf).double()
    edit = lamic([FIRST, SECOND])[stage - 1]
    torch.testing.assert_close(output(call, edit), attended(call, bias), **TIGHT)
    assert bias.isinf().any() or (call.site.kind == "self" and stage == 2)


def test_the_stages_of_lamic_share_the_steps():
    first, second = lamic([FIRST], switch=0.3, where=Where(branches=Which(guided=True)))
    steps = [
        tuple(i for i in range(10) if edit.where.at(type(double_call().site)(i, 0, 0), 10, 1))
        for edit in (first, second)
    ]
    assert steps == [(0, 1, 2), (3, 4, 5, 6, 7, 8, 9)]
    assert not first.where.rows((Branch(guided=False),))


def test_without_words_regions_stay_apart():
    call = batch([Branch(guided=False)])
    served(call, lamic([FIRST, SECOND])[0])
    (change,) = call.changes
    seen = change.numerator[change.rows][:, change.columns] > 0
    left, right = 7 + 8, 7 + 8 + 3  # of frame 1
    assert not seen[left, right]
    assert seen[left, :7].all()
    assert seen[:7].all()


@pytest.mark.parametrize("settings", JOINT + SELF + CROSS, ids=str)
def test_mask2dit_equals_its_rules(settings):
    call = double_call(**settings)
    scene = {"T0": 0, "T1": 1}

    def member(call, side):
        kinds = names(call, side)
        for name, place in zip(kinds, position(call, side), strict=True):
            yield ("text", scene.get(name)) if place is None else ("video", {0: 0, 1: 1, 2: None}[place[0]])

    def allowed(row, column):
        if None in (row[1], column[1]) or row[1] == column[1]:
            return True
        return row[0] == column[0] == "video"

    columns = list(member(call, "columns"))
    seen = [[allowed(a, b) for b in columns] for a in member(call, "rows")]
    bias = torch.where(torch.tensor(seen), 0.0, -math.inf).double()
    edit = mask2dit([(words("red", "cat"), frames(0)), (words("runs"), frames(1))])
    torch.testing.assert_close(output(call, edit), attended(call, bias), **TIGHT)
    assert bias.isinf().any() or call.site.kind == "self"


def test_tables_say_what_they_are():
    assert str(lamic([FIRST])[0]).startswith("LAMIC stage 1(words(red, cat), ")
    assert str(mask2dit([(words("red"), frames(0))])) == "Mask2DiT(words(red), frames(0:1))"


def test_tables_refuse():
    for settings in ({"subjects": []}, {"subjects": [FIRST], "where": Where(steps=3)}):
        with pytest.raises(UsageError, match="LAMIC must have subjects, and sets its steps"):
            lamic(**settings)
    with pytest.raises(UsageError, match="Mask2DiT must have scenes"):
        mask2dit([])
    with pytest.raises(UsageError, match="0 <= start < stop <= 1"):
        lamic([FIRST], switch=0.0)
