"""Added keys against the whole matrix with further columns."""

from __future__ import annotations

import math

import pytest
import torch

from control.bank import Bank
from control.bias import Bias
from control.constant import Constant
from control.extend import Extend
from control.sink import Sinks
from control.source import Itself, Stored
from control.window import Window
from probe.errors import PlanError, UsageError, WordError
from probe.region import frames, text, video, words
from probe.site import Branch, Where, Which
from tests.control.whole import attended, batch, double_call, inside, logits, output, served, values
from tests.probe.readout.calls import JOINT, SELF

TIGHT = {"atol": 1e-6, "rtol": 1e-6}
PAIR = [Branch(0), Branch(1)]


def extended(call, k, v, bias=0.0, entry=0, rows=None, own=None):
    """[H, N, D] with keys [H, m, D] and values appended; `rows` see them, `own` is a bias on the others."""
    old = logits(call, entry) + (0 if own is None else own)
    q = call.own["q"][entry, :, : old.shape[1]].double()
    new = q @ k.double().mT * q.shape[-1] ** -0.5 + bias
    if rows is not None:
        new[:, ~rows] = -math.inf
    weights = torch.cat([old, new], -1).softmax(-1)
    return weights @ torch.cat([values(call, entry), v.double()], 1)


@pytest.mark.parametrize("settings", JOINT + SELF, ids=str)
@pytest.mark.parametrize("bias", [0.0, -1.5, 2.0])
def test_video_keys_of_another_prompt_join_the_softmax(settings, bias):
    call = batch(PAIR, prompts=2, **settings)
    columns = inside(call, "columns", ("video", None)).nonzero().flatten()
    k, v = (call.own[name][0][:, columns] for name in "kv")
    got = output(call, Extend(0, 1, bias=bias), entry=1)
    torch.testing.assert_close(got, extended(call, k, v, bias, entry=1), **TIGHT)
    torch.testing.assert_close(output(call, entry=0), attended(call, torch.zeros(1, 1)), **TIGHT)
    assert {change.entry for change in call.changes} == {1}


def test_columns_rows_heads_and_strength_are_chosen():
    call = batch(PAIR, prompts=2)
    source = inside(call, "columns", ("video", 1)).nonzero().flatten()
    cat = torch.tensor([2])  # "a red cat"
    columns = torch.cat([cat, source])
    k, v = (call.own[name][0][:, columns] for name in "kv")
    rows = inside(call, "rows", ("video", 2))
    wanted = attended(call, torch.zeros(1, 1), 1)
    wanted[1] = extended(call, k, v, math.log(0.3), 1, rows)[1]
    edit = Extend(0, 1, columns=words("cat") | frames(1), rows=frames(2), strength=0.3, where=Where(heads=1))
    torch.testing.assert_close(output(call, edit, entry=1), wanted, **TIGHT)


def test_padding_that_the_source_may_not_see_stays_out():
    call = batch(PAIR, prompts=2, order="video-text", visible=29)
    k, v = (call.own[name][0][:, :29] for name in "kv")
    got = output(call, Extend(0, 1, columns=None), entry=1)
    torch.testing.assert_close(got, extended(call, k, v, entry=1), **TIGHT)


def test_all_of_a_batch_share_their_keys():
    """A function says whose keys: those of the next prompt, around."""
    call = batch([Branch(0), Branch(1), Branch(2)], prompts=3)
    edit = Extend(lambda branch: Branch((branch.prompt + 1) % 3), columns=video())
    served(call, edit)
    for entry in range(3):
        k, v = (call.own[name][(entry + 1) % 3, :, 7:] for name in "kv")
        torch.testing.assert_close(call.out[entry], extended(call, k, v, entry=entry), **TIGHT)


def test_several_extensions_compose_and_windows_leave_them():
    call = batch([Branch(0), Branch(1), Branch(2)], prompts=3)
    k, v = (torch.cat([call.own[name][0, :, 7:15], call.own[name][1, :, 7:]], 1) for name in "kv")
    bias = torch.zeros(31, 31, dtype=torch.float64)
    bias[7:, 7:] = torch.block_diag(*[torch.ones(8, 8)] * 3).log()
    got = output(call, Extend(0, 2, columns=frames(0)), Window(frames=0), Extend(1, 2), entry=2)
    torch.testing.assert_close(got, extended(call, k, v, entry=2, own=bias), **TIGHT)


def test_a_branch_that_is_its_own_peer_is_left_alone():
    call = batch(PAIR, prompts=2)
    served(call, Extend(0))
    assert {change.entry for change in call.changes} == {1}
    k, v = (call.own[name][0, :, 7:] for name in "kv")
    own = double_call()
    torch.testing.assert_close(output(own, Extend(Itself())), extended(own, k, v), **TIGHT)


def test_words_are_those_of_the_source_and_none_in_the_unconditional_half():
    halves = [Branch(0, guided=False), Branch(1, guided=False), Branch(0), Branch(1)]
    call = batch(halves, prompts=2)
    served(call, Extend(0, 1, columns=words("cat")))
    assert [change.entry for change in call.changes] == [3]
    with pytest.raises(WordError, match="'dog'.*a, red, cat, runs, left"):
        served(batch(PAIR, prompts=2), Extend(0, 1, columns=words("dog")))


@pytest.mark.parametrize("settings", JOINT + SELF, ids=str)
def test_a_null_key_takes_mass_and_gives_nothing(settings):
    call = double_call(**settings)
    zero = torch.zeros(2, 1, 16)
    got = output(call, Extend(Constant("zero"), bias=1.5))
    torch.testing.assert_close(got, extended(call, zero, zero, 1.5), **TIGHT)
    lse = logits(call).logsumexp(-1)
    torch.testing.assert_close(got, attended(call, torch.zeros(1, 1)) * (lse - 1.5).sigmoid()[..., None], **TIGHT)


@pytest.mark.parametrize("settings", JOINT, ids=str)
def test_a_constant_key_has_the_value_it_is_given(settings):
    call, zero = double_call(**settings), torch.zeros(2, 1, 16)
    mean = values(call)[:, inside(call, "columns", ("video", 1))].mean(1, keepdim=True)
    got = output(call, Extend(Constant("mean"), columns=frames(1), bias=2.0))
    torch.testing.assert_close(got, extended(call, zero, mean, 2.0), **TIGHT)
    every = values(call).mean(1, keepdim=True)
    got = output(double_call(**settings), Extend(Constant("mean"), columns=None, bias=2.0))
    torch.testing.assert_close(got, extended(call, zero, every, 2.0), **TIGHT)
    value = torch.randn(2, 16, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    got = output(double_call(**settings), Extend(Constant(value), bias=2.0))
    torch.testing.assert_close(got, extended(call, zero, value[:, None], 2.0), **TIGHT)


def test_a_constant_key_of_no_column_is_not_added():
    """The unconditional half shows no words, and the keys of cross attention are no video."""
    halves, mean = [Branch(guided=False), Branch()], Constant("mean")
    assert [change.entry for change in served(batch(halves), Extend(mean, columns=words("cat"))).changes] == [1]
    for source in (mean, Constant("zero"), Constant(torch.ones(16))):
        assert not served(double_call(kind="cross"), Extend(source)).changes
        assert served(double_call(kind="cross"), Extend(source, columns=text())).changes


def cells(call, x, pool, counted):
    """Means over the cells of the grid, in order, of the tokens that are counted."""
    frame_count, height, width = call.layout.grid.shape
    start, means = call.columns.video_slice.start, []
    for f in range(0, frame_count, pool[0]):
        for top in range(0, height, pool[1]):
            for left in range(0, width, pool[2]):
                inside = [
                    start + (t * height + y) * width + z
                    for t in range(f, min(f + pool[0], frame_count))
                    for y in range(top, min(top + pool[1], height))
                    for z in range(left, min(left + pool[2], width))
                    if counted(t, y, z)
                ]
                if inside:
                    means.append(x[:, inside].mean(1))
    return torch.stack(means, 1)


@pytest.mark.parametrize("settings", JOINT + SELF, ids=str)
@pytest.mark.parametrize("pool", [(1, 2, 2), (2, 2, 3), (1, 4, 4)])
def test_pooled_keys_equal_the_means_of_their_cells(settings, pool):
    """As CLEAR: its own video, for the video rows."""
    call = double_call(**settings)
    k, v = (cells(call, call.own[name][0], pool, lambda f, y, x: True) for name in "kv")
    got = output(call, Extend(Itself(), pool=pool, rows=video(), bias=math.log(4)))
    rows = inside(call, "rows", ("video", None))
    torch.testing.assert_close(got, extended(call, k, v, math.log(4), rows=rows), **TIGHT)


def test_pooled_keys_are_of_the_chosen_columns():
    call = double_call()
    k, v = (cells(call, call.own[name][0], (2, 2, 2), lambda f, y, x: f == 1) for name in "kv")
    got = output(call, Extend(Itself(), pool=(2, 2, 2), columns=frames(1)))
    torch.testing.assert_close(got, extended(call, k, v), **TIGHT)


def test_keys_of_an_earlier_call_of_the_step():
    """One call per entry, as Mochi: the source first."""
    calls = [batch([branch], prompts=2, sharp=1 + branch.prompt) for branch in PAIR]
    for call in calls:
        call.prompts = calls[0].prompts
    edit = Extend(0, 1, columns=words("red") | video())
    edit.begin(calls[0].prompts, 10, 1)
    for call in calls:
        edit.serve(call, edit.where.rows(call.branches))
    assert not calls[0].changes
    columns = [1, *range(7, 31)]
    k, v = (calls[0].own[name][0][:, columns] for name in "kv")
    (added,) = calls[1].changes
    assert torch.equal(added.k, k)
    assert torch.equal(added.v, v)
    with pytest.raises(UsageError, match="An area of a source in another call must be a region. Got sinks"):
        found = Extend(0, 1, columns=Sinks(1.5))
        found.begin(calls[0].prompts, 10, 1)
        for call in calls:
            found.serve(call, found.where.rows(call.branches))


def test_keys_of_a_bank():
    bank, first, call = Bank("kv"), double_call(seed=3), double_call()
    bank.begin((), 10, 1)
    bank.serve(first, (0,))
    k, v = (first.own[name][0, :, 7:] for name in "kv")
    torch.testing.assert_close(output(call, Extend(Stored(bank))), extended(call, k, v), **TIGHT)
    with pytest.raises(UsageError, match="Tell the trace its prompts"):
        served(double_call(), Extend(Stored(bank), columns=words("red"), where=Where(branches=Which(guided=True))))


def test_an_edit_of_the_source_does_not_reach_its_takers():
    call, plain = batch(PAIR, prompts=2), batch(PAIR, prompts=2)
    call.writable("k")[0] *= 2
    k, v = (call.own[name][0, :, 7:] for name in "kv")
    torch.testing.assert_close(output(call, Extend(0, 1), entry=1), extended(plain, k, v, entry=1), **TIGHT)


@pytest.mark.parametrize(
    "edit",
    [
        Extend(0, 1, strength=0.0),
        Extend(0, 1, columns=video() & text()),
        Extend(0, 1, rows=video() & text()),
        Extend(lambda branch: None),
    ],
    ids=str,
)
def test_what_adds_nothing_asks_for_nothing(edit):
    assert not served(batch(PAIR, prompts=2), edit).changes


def test_added_keys_may_be_the_only_ones_seen():
    """A hidden row is refused by the edit that hides it, whatever is added."""
    with pytest.raises(PlanError, match=r"at least one key. Got Bias\(-inf"):
        served(batch(PAIR, prompts=2), Extend(0, 1), Bias(-math.inf))


def test_what_an_extension_must_be():
    with pytest.raises(UsageError, match="bias of added keys must be a number. Got -inf"):
        Extend(0, bias=-math.inf)
    with pytest.raises(UsageError, match="A pool must be"):
        Extend(Itself(), pool=(4, 4))
    with pytest.raises(UsageError, match="constant key must have a value"):
        Extend(Constant(torch.zeros(2, 31, 16)))
    with pytest.raises(UsageError, match="strength of added keys must be 0 or more. Got -1"):
        served(batch(PAIR, prompts=2), Extend(0, 1, strength=-1.0))
    with pytest.raises(PlanError, match="must name prompts of the run, 0 to 1"):
        served(batch(PAIR, prompts=2), Extend(5, 1))
