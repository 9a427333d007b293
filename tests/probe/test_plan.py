from dataclasses import dataclass, field

import pytest
import torch

from probe import Branch, Progress, Site, Where, Which
from probe.clock import Clock
from probe.errors import PlanError, TapError, UsageError
from probe.plan import Handler, Plan, Stage
from probe.site import chosen


@dataclass(eq=False)
class Edit(Handler):
    where: Where = field(default_factory=Where)
    touches: frozenset = frozenset("k")
    rank: int = 0
    stage = Stage.EDIT

    def serve(self, call, rows):
        """Nothing: these tests only plan."""

    def cost(self, layout):
        return 0.5


@pytest.mark.parametrize(
    ("span", "numbers"),
    [
        (None, (0, 1, 2, 3)),
        (2, (2,)),
        (-1, (3,)),
        (slice(1, 3), (1, 2)),
        (slice(-2, None), (2, 3)),
        ({3, 0}, (0, 3)),
        (range(1, 4), (1, 2, 3)),
        (Progress(0.25, 0.75), (1, 2)),
        ((), ()),
    ],
)
def test_spans_choose_numbers(span, numbers):
    assert chosen(span, 4) == numbers


@pytest.mark.parametrize("span", [4, -5, {1, 9}])
def test_a_number_outside_is_refused(span):
    with pytest.raises(UsageError, match="0 to 3"):
        chosen(span, 4)


def test_a_progress_interval_must_be_one():
    with pytest.raises(UsageError, match="0 <= start < stop <= 1"):
        Progress(0.5, 0.5)


def test_where_selects_calls_and_rows():
    where = Where(steps=slice(1, 3), layers={0, 2}, turns=0, branches=Which(role="target", guided=True))
    assert where.at(Site(1, 0, 2), 4, 3)
    assert not where.at(Site(3, 0, 2), 4, 3)
    assert not where.at(Site(1, 0, 1), 4, 3)
    assert not where.at(Site(1, 1, 2), 4, 3)
    branches = [Branch(), Branch(role="target"), Branch(role="target", guided=False)]
    assert where.rows(branches) == (1,)


def test_the_plan_orders_and_explains():
    late, early = Edit(rank=3), Edit(rank=1, where=Where(steps=1))
    plan = Plan([late, early], steps=4, layers=3)
    assert plan.at(Site(1, 0, 0)) == (early, late)
    assert plan.at(Site(2, 0, 0)) == (late,)
    assert plan.explain(1, 0).splitlines() == ["step 1 layer 0:", "  edit: Edit", "  edit: Edit", "  attention"]
    assert plan.cost(None) == pytest.approx((0.5 * 12 + 0.5 * 3) / 12)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Edit(touches=frozenset("k")), Edit(touches=frozenset("v"))),
        (Edit(rank=1), Edit(rank=2)),
        (Edit(Where(steps=0)), Edit(Where(steps=1))),
        (Edit(Where(heads=0)), Edit(Where(heads={1, 2}))),
        (Edit(Where(branches=Which(prompt=0))), Edit(Where(branches=Which(prompt=1)))),
        (Edit(Where(heads=Progress(0, 0.5))), Edit(Where(heads=1))),  # overlap is seen when the number of heads is
        (Edit(Where(turns=0)), Edit(Where(turns=1))),
    ],
)
def test_edits_apart_do_not_clash(one, other):
    Plan([one, other], steps=2, layers=2)


def test_edits_at_one_place_clash():
    with pytest.raises(PlanError, match="must not change the same tensor"):
        Plan([Edit(Where(layers={0, 1})), Edit(Where(heads=1, steps=1))], steps=2, layers=2)


def clock():
    return Clock(lambda: 10, lambda batch, name: tuple(Branch() for _ in range(batch)))


def test_the_clock_reads_distinct_timesteps():
    c, seen = clock(), []
    for t in (900, 900, 500, 100, 100):
        c.forward(torch.tensor([t]), 2)
        seen.append((c.step, c.turn))
    assert seen == [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1)]
    assert c.steps == 10
    assert len(c.branches) == 2


def test_a_second_run_in_one_trace_is_refused():
    c = clock()
    for t in range(10):
        c.forward(torch.tensor([999 - t]), 1)
    with pytest.raises(TapError, match="must cover one run of 10 steps. Got step 10"):
        c.forward(torch.tensor([999]), 1)


def test_a_clock_told_once_must_be_told_always():
    c = clock()
    c.tell(0, 2, [Branch()])
    c.forward(torch.tensor([999]), 1)
    with pytest.raises(TapError, match="before each model forward"):
        c.forward(torch.tensor([500]), 1)


def test_told_beats_read():
    c = clock()
    for t in (900, 500, 500):  # a second-order sampler evaluates twice in a step
        c.tell(step=4, steps=7, branches=[Branch(role="source")])
        c.forward(torch.tensor([t]), 1)
        assert (c.step, c.turn, c.steps, c.branches[0].role) == (4, 0, 7, "source")


@pytest.mark.parametrize(
    ("where", "said"),
    [
        (Where(heads=7), "The heads of Edit do not fit this model. A selection must lie in 0 to 1. Got \\[7\\]"),
        (Where(heads=slice(5, 9)), "selects none of 2 heads"),
        (Where(layers=9), "The layers of Edit do not fit this model"),
        (Where(layers=0, kinds={"single"}), "at layers and kinds that it does not have together"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_it_runs(where, said):
    with pytest.raises(PlanError, match=said):
        Plan([Edit(where)], steps=2, layers=2, places=[(0, "double"), (1, "single")], heads=2)


def test_cost_counts_the_heads_and_places_that_are_served():
    class Costly(Edit):
        def cost(self, layout):
            return 1.0

    def cost(where):
        return Plan([Costly(where)], steps=2, layers=2, places=[(0, "double"), (1, "single")], heads=4).cost(None)

    assert cost(Where()) == 1
    assert cost(Where(kinds={"single"})) == 0.5
    assert cost(Where(heads={0})) == 0.25


@pytest.mark.parametrize("turns", [slice(-1, None), slice(0, 4, 2), Progress(0, 0.5)])
def test_turns_are_counted_from_the_first(turns):
    with pytest.raises(UsageError, match="Turns must be"):
        Where(turns=turns).at(Site(0, 0, 0), 1, 1)
