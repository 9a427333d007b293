"""Equal batch entries are computed once: nothing but the work changes, and nothing is left behind."""

from dataclasses import dataclass, field

import pytest
import torch

import control
import probe
from control.bank import Bank
from control.extract import ExtractMask
from control.skip import Skip
from control.source import Stored
from probe.errors import TapError
from probe.plan import Handler, Stage
from probe.site import Branch, Where, Which
from tests import tiny

ROLES = [Branch(segment=0, role="source"), Branch(segment=1, role="source"), Branch(segment=1, role="target")]
ALIKE = (0, 1, 1)


@pytest.fixture(scope="module")
def pipe():
    return tiny.pipeline(dtype=torch.float64)


@dataclass(eq=False)
class Calls(Handler):
    """What each call holds."""

    where: Where = field(default_factory=Where)
    stage: Stage = Stage.USED

    def __post_init__(self):
        self.seen = {}

    def serve(self, call, rows):
        self.seen[call.site.layer] = (call.branches, tuple(call.standing(row) for row in rows), len(call.q))


def forward(pipe, handlers, alike):
    """One forward of three entries, of which the last two have the same input."""
    drawn = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, 8, 8, generator=drawn, dtype=torch.float64)[[0, 1, 1]]
    text = torch.randn(2, tiny.TEXT, 16, generator=drawn, dtype=torch.float64)[[0, 1, 1]]
    traced = probe.trace(pipe, *handlers)

    def drive(clock):
        clock.tell(0, 1, ROLES, alike=alike)
        return pipe.transformer(x, text, torch.full((3,), 500), return_dict=False)[0]

    with torch.no_grad():
        return traced.run(drive, [tiny.PROMPT]), traced


def shared_last():
    where = Where(layers={2}, branches=Which(role="target"))
    return control.Transfer("kv", lambda branch: ROLES[0], where=where)


def test_the_output_is_that_of_all_entries(pipe):
    whole, every = forward(pipe, [shared_last()], ())
    once, fewer = forward(pipe, [shared_last()], ALIKE)
    assert (whole - once).abs().max() < 1e-12
    assert not torch.equal(once[1], once[2])
    assert (every.passes, fewer.passes) == (9, 2 + 2 + 3)


def test_without_an_edit_they_are_one_to_the_end(pipe):
    whole, _ = forward(pipe, [], ())
    once, traced = forward(pipe, [], ALIKE)
    assert (whole - once).abs().max() < 1e-12
    assert torch.equal(once[1], once[2])
    assert traced.passes == 6


def test_a_call_says_what_its_entries_stand_for(pipe):
    calls = Calls()
    forward(pipe, [shared_last(), calls], ALIKE)
    plain = Branch(segment=1)
    assert calls.seen[0] == ((ROLES[0], plain), ((ROLES[0],), tuple(ROLES[1:])), 2)
    assert calls.seen[2] == (tuple(ROLES), tuple((role,) for role in ROLES), 3)


def test_readouts_keep_a_value_for_each_branch_of_every_layer(pipe):
    wanted, found = probe.WordMaps("cat"), probe.WordMaps("cat")
    forward(pipe, [shared_last(), wanted], ())
    forward(pipe, [shared_last(), found], ALIKE)
    assert set(found.values) == set(wanted.values)
    for at, value in wanted.values.items():
        assert abs(found.values[at]["vt"] - value["vt"]).max() < 1e-6
        assert found.words_of[at.branch] == ("cat",)


@pytest.mark.parametrize(
    "edit",
    [
        control.Scale("o", 0.0, where=Where(layers={1}, branches=Which(role="target"))),
        control.Bias(1.0, probe.region.video(), where=Where(layers={1}, branches=Which(role="source"))),
        Skip("feed_forward", where=Where(layers={1}, branches=Which(role="target"))),
        control.Fork(
            control.Edited(control.Bias(2.0, probe.region.text(), where=Where(branches=Which(role="target")))),
            where=Where(layers={1}),
        ),
    ],
    ids=str,
)
def test_the_first_edit_that_tells_them_apart_ends_it(pipe, edit):
    whole, _ = forward(pipe, [edit], ())
    once, traced = forward(pipe, [edit], ALIKE)
    assert (whole - once).abs().max() < 1e-12
    assert not torch.equal(once[1], once[2])
    assert traced.passes == 2 + 3 + 3


def test_a_bank_keeps_every_branch_and_gives_it_back(pipe):
    bank = Bank("qk", Where(layers={0}))
    moved = control.Transfer("qk", Stored(bank, layer=0), where=Where(layers={2}))
    whole, _ = forward(pipe, [bank, moved], ())
    once, traced = forward(pipe, [bank, moved], ALIKE)
    assert (whole - once).abs().max() < 1e-12
    assert len(bank) == 3
    assert traced.passes == 2 + 2 + 3  # what roles take from a bank is kept apart


def test_a_mask_of_words_counts_a_segment_once(pipe):
    expected, found = ExtractMask("cat"), ExtractMask("cat")
    forward(pipe, [shared_last(), expected], ())
    forward(pipe, [shared_last(), found], ALIKE)
    for segment in (0, 1):
        branch = Branch(segment=segment)
        assert abs(found.score(branch) - expected.score(branch)).max() < 1e-6
        assert found._tallies[branch].upto("run")[0] == 3  # one map for each layer, whatever the roles


@pytest.mark.parametrize("what", ["block", "attention", "feed_forward"])
def test_edits_that_treat_them_alike_do_not_end_it(pipe, what):
    edit = Skip(what, where=Where(layers={1}, branches=Which(segment=1)))
    whole, _ = forward(pipe, [edit], ())
    once, traced = forward(pipe, [edit], ALIKE)
    assert (whole - once).abs().max() < 1e-12
    assert traced.passes == 6


def test_nothing_is_left_behind(pipe):
    before = tiny.latents(pipe)
    forward(pipe, [shared_last()], ALIKE)
    assert torch.equal(tiny.latents(pipe), before)


def test_entries_told_alike_must_be_as_many_as_the_batch(pipe):
    with pytest.raises(TapError, match="as many as the batch"):
        forward(pipe, [], (0, 0))
