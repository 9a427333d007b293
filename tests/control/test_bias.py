"""Biases by area, by table and by function, against the whole matrix; each once more in whole pipelines."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from control import weighting
from control.bias import Bias, BiasFunction, BiasTable
from probe.errors import PlanError, UsageError, WordError
from probe.region import frames, padding, text, video, words
from probe.site import Branch, Where, Which
from tests.control.whole import attended, batch, double_call, inside, output, position, served
from tests.probe.readout.calls import CROSS, JOINT, SELF

HIDDEN = {"order": "video-text", "visible": 29}
TIGHT = {"atol": 1e-6, "rtol": 1e-6}


def at(rows, columns, value):
    """A bias [N, M] on a block."""
    return torch.where(rows[:, None] & columns, value, 0.0).double()


@pytest.mark.parametrize("value", [1.5, -2.0, -math.inf])
@pytest.mark.parametrize("settings", JOINT + SELF, ids=str)
def test_a_bias_on_columns_equals_the_matrix(settings, value):
    call = double_call(**settings)
    bias = at(inside(call, "rows", ("video", None)), inside(call, "columns", ("video", 1)), value)
    got = output(call, Bias(value, frames(1), rows=video()))
    torch.testing.assert_close(got, attended(call, bias), **TIGHT)
    assert not torch.allclose(got, attended(call, 0 * bias.nan_to_num()))


@pytest.mark.parametrize("settings", JOINT + CROSS, ids=str)
def test_a_bias_on_a_word_of_all_rows_equals_the_matrix(settings):
    call = double_call(**settings)
    red = inside(call, "columns", ("text", None)).nonzero()[1]  # "a red cat"
    columns = torch.zeros(call.sides(0)[1].total, dtype=torch.bool)
    columns[red] = True
    bias = at(torch.ones(call.sides(0)[0].total, dtype=torch.bool), columns, -0.7)
    torch.testing.assert_close(output(call, Bias(-0.7, words("red"))), attended(call, bias), **TIGHT)


def test_the_strength_multiplies_finite_biases_and_hidden_stays_hidden():
    def ramp(progress):
        return progress - 0.25

    for step, strength in ((0, -0.25), (5, 0.25)):
        call = double_call()
        soft = at(inside(call, "rows", ("video", None)), inside(call, "columns", ("video", 0)), 2 * strength)
        hard = at(inside(call, "rows", ("video", None)), inside(call, "columns", ("video", 2)), -math.inf)
        edits = [
            Bias(2.0, frames(0), rows=video(), strength=ramp),
            Bias(-math.inf, frames(2), rows=video(), strength=ramp),
        ]
        torch.testing.assert_close(output(call, *edits, step=step), attended(call, soft + hard), **TIGHT)


def test_one_edit_follows_its_strength_from_step_to_step():
    edit = Bias(2.0, frames(0), strength=lambda progress: progress)
    for step in (1, 4):
        call = double_call()
        bias = at(torch.ones(31, dtype=torch.bool), inside(call, "columns", ("video", 0)), 0.2 * step)
        torch.testing.assert_close(output(call, edit, step=step), attended(call, bias), **TIGHT)


def test_some_heads_alone_change():
    call = double_call()
    bias = torch.zeros(2, 31, 31, dtype=torch.float64)
    bias[1, :, inside(call, "columns", ("video", 0))] = 1.0
    torch.testing.assert_close(output(call, Bias(1.0, frames(0), where=Where(heads=1))), attended(call, bias), **TIGHT)


def test_words_leave_the_unconditional_half_alone():
    call = batch([Branch(guided=False), Branch()])
    served(call, Bias(3.0, words("red")))
    assert [change.entry for change in call.changes] == [1]


TABLE = ((0.5, -math.inf, 1.0), (0.0, 2.0, -1.0), (-math.inf, 0.25, 0.0))


@pytest.mark.parametrize("settings", JOINT, ids=str)
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_a_table_equals_the_matrix(settings, strength):
    """Tokens of no area are free, and a token of two areas takes the larger value."""
    areas = (words("red", "cat"), frames(0, 2), frames(1, 3))
    call = double_call(**settings)
    bias = torch.zeros(call.sides(0)[0].total, call.sides(0)[1].total, dtype=torch.float64)
    start = call.layout.text_slice.start
    members = {start + 1: {0}, start + 2: {0}}
    for i, place in enumerate(position(call, "rows")):
        if place is not None:
            members[i] = {area for area, inside in ((1, place[0] < 2), (2, place[0] > 0)) if inside}
    for i, mine in members.items():
        for j, theirs in members.items():
            bias[i, j] = max(
                TABLE[a][b] if math.isinf(TABLE[a][b]) else strength * TABLE[a][b] for a in mine for b in theirs
            )
    edit = BiasTable(areas, TABLE, strength=strength)
    torch.testing.assert_close(output(call, edit), attended(call, bias), **TIGHT)


def test_a_table_can_be_limited_to_rows():
    call = double_call()
    bias = at(inside(call, "rows", ("video", 0)), inside(call, "columns", ("video", 1), ("video", 2)), -math.inf)
    table = ((0.0, -math.inf), (-math.inf, 0.0))
    edit = BiasTable((frames(0), frames(1, 3)), table, rows=frames(0))
    torch.testing.assert_close(output(call, edit), attended(call, bias), **TIGHT)


def decay(i, j):
    return -0.5 * (i - j)[..., 0].abs() - 0.25 * (i - j)[..., 2].square()


@pytest.mark.parametrize("settings", JOINT + SELF, ids=str)
@pytest.mark.parametrize(("few", "some"), [(64, 64), (2, 64), (2, 2)], ids=["table", "mask from a table", "mask"])
def test_a_function_equals_the_matrix(settings, few, some, monkeypatch):
    monkeypatch.setattr(weighting, "MOST_GROUPS", few)
    monkeypatch.setattr(weighting, "MOST_LOOKED_UP", some)
    call = double_call(**settings)
    bias = torch.zeros(call.sides(0)[0].total, call.sides(0)[1].total, dtype=torch.float64)
    for i, a in enumerate(position(call, "rows")):
        for j, b in enumerate(position(call, "columns")):
            if a is not None and b is not None and a[0] > 0 and b[0] < 2:
                bias[i, j] = 0.5 * (-0.5 * abs(a[0] - b[0]) - 0.25 * (a[2] - b[2]) ** 2)
    for axes in ((0, 2), (0, 1, 2)):
        fresh = replace(call, changes=[])
        edit = BiasFunction(decay, frames(0, 2), axes=axes, rows=frames(1, 3), strength=0.5)
        torch.testing.assert_close(output(fresh, edit), attended(call, bias), **TIGHT)
        assert type(fresh.changes[0]).__name__ == ("Factors" if few == 64 else "Bias")


def test_a_function_is_asked_once_for_a_layout():
    asked = []

    def count(i, j):
        asked.append(1)
        return decay(i, j)

    edit, call = BiasFunction(count, axes=(0,)), batch([Branch(), Branch(1)], prompts=2)
    served(call, edit)
    served(replace(call, changes=[]), edit)
    assert len(call.changes) == 2
    assert len(asked) == 1


def test_both_halves_share_what_does_not_depend_on_words():
    call = batch([Branch(guided=False), Branch()])
    served(call, Bias(1.0, frames(0), rows=video()), Bias(1.0, video() & ~words("red")))
    one, other, *rest = sorted(call.changes, key=lambda change: change.entry)
    frame = [change for change in call.changes if change.columns.sum() == 8]
    assert [change.entry for change in frame] == [0, 1]
    assert frame[0].columns is frame[1].columns
    assert frame[0].numerator is frame[1].numerator
    assert len({id(change.columns) for change in (one, other, *rest)}) == 3


def test_edits_of_weights_compose_in_any_order():
    edits = [Bias(1.0, frames(0)), Bias(-math.inf, frames(2), rows=video()), BiasFunction(decay, axes=(0, 2))]
    one = output(double_call(), *edits)
    torch.testing.assert_close(one, output(double_call(), *edits[::-1]), **TIGHT)
    assert not torch.allclose(one, output(double_call(), *edits[:2]))


@pytest.mark.parametrize(
    "edit",
    [
        Bias(0.0, video()),
        Bias(2.0, video(), strength=0.0),
        Bias(-math.inf, video(), rows=video() & text()),
        Bias(2.0, video() & text()),
        BiasTable((video(), text()), ((0.0, 0.0), (0.0, 0.0))),
        BiasTable((video() & text(),), ((5.0,),)),
        BiasFunction(lambda i, j: 0.0 * (i - j)[..., 0]),
    ],
    ids=str,
)
def test_what_changes_nothing_asks_for_nothing(edit):
    assert not served(double_call(), edit).changes


def test_a_row_without_keys_is_refused():
    for edit in (Bias(-math.inf), Bias(-math.inf, video() | text() | padding(), rows=frames(0))):
        with pytest.raises(PlanError, match=r"must see at least one key. Got Bias\(-inf on .* at step 0 layer 0"):
            served(double_call(), edit)
    with pytest.raises(PlanError, match="Got BiasTable.*hides all keys"):
        served(double_call(kind="self", text=0), BiasTable((video(),), ((-math.inf,),)))
    with pytest.raises(PlanError, match="Got Bias.*hides all keys"):
        served(double_call(**HIDDEN), Bias(-math.inf, video() | text() | padding()))
    with pytest.raises(PlanError, match="Got BiasFunction.*hides all keys"):
        served(double_call(kind="self", text=0), BiasFunction(lambda i, j: torch.full((1, 1), -math.inf)))


def test_pairs_that_hide_every_key_of_a_row_are_refused(monkeypatch):
    monkeypatch.setattr(weighting, "MOST_GROUPS", 5)
    only = BiasFunction(lambda i, j: torch.where((i - j)[..., 0] < 0, 0.0, -math.inf))
    with pytest.raises(PlanError, match="hides all keys of some rows"):
        served(double_call(kind="self", text=0), only)
    assert served(double_call(), only).changes  # the text is seen


def test_a_missing_word_is_refused_with_the_words_of_the_prompt():
    with pytest.raises(WordError, match="'dog'.*a, red, cat, runs, left"):
        served(double_call(), Bias(1.0, words("dog")))
    served(batch([Branch(guided=False)]), Bias(1.0, words("dog")))
    served(batch([Branch(0), Branch(1)], prompts=2), Bias(1.0, words("red"), where=Where(branches=Which(prompt=1))))


def test_values_that_cannot_work_are_refused():
    for value in (math.nan, math.inf):
        with pytest.raises(UsageError, match="bias must be a number, or -inf"):
            Bias(value, video())
    with pytest.raises(UsageError, match="at most 80.*Got 90"):
        served(double_call(), Bias(90.0, video()))
    with pytest.raises(UsageError, match="one row and one column"):
        BiasTable((video(), text()), ((0.0, 0.0),))
    with pytest.raises(UsageError, match="1 to 62"):
        BiasTable((), ())
    with pytest.raises(UsageError, match="Axes must be some of"):
        BiasFunction(decay, axes=(3,))
    with pytest.raises(UsageError, match="at most 80.*Got nan"):
        served(double_call(), BiasFunction(lambda i, j: torch.full((1, 1), math.nan)))
