"""The direction between two prompts, against means by hand."""

from __future__ import annotations

import pytest
import torch

from control.address import Found
from control.between import Between
from probe.errors import PlanError
from probe.plan import Plan
from probe.region import frames
from probe.serve import after_attention, before_attention
from probe.site import Branch, Where, Which
from tests.control.whole import attended, batch

HERE = Where(branches=Which(prompt=2))


class Some(Found):
    """Another area for each batch entry."""

    def __init__(self, *areas):
        self.areas = areas

    def inside(self, call, entry, side):
        return torch.from_numpy(self.areas[entry].mask(getattr(call, side)))


def moved(*edits, entries=3):
    """Unedited and edited outputs of a call with some prompts."""
    call = batch([Branch(prompt) for prompt in range(entries)], prompts=entries)
    plan = Plan(edits, steps=1, layers=1)
    own = torch.stack([attended(call, torch.zeros(1, 1), entry) for entry in range(entries)])
    before_attention(call, plan)
    return own, after_attention(call, plan, own.clone())


def test_outputs_move_from_one_prompt_to_another():
    """Half of the way, each mean over its own rows."""
    own, out = moved(Between(away=0, to=1, rows=Some(frames(0), frames(1), frames(2)), strength=0.5, where=HERE))
    way = own[1, :, 15:23].mean(1, keepdim=True) - own[0, :, 7:15].mean(1, keepdim=True)
    expected = own.clone()
    expected[2, :, 23:] += 0.5 * way
    torch.testing.assert_close(out, expected)
    assert way.abs().max() > 0.1


@pytest.mark.parametrize("keep_norm", [False, True])
@pytest.mark.parametrize("lost", [0, 1])
def test_from_and_to_nowhere_nothing_moves(lost, keep_norm):
    """As a Steering where an area has no row."""
    areas = [frames(0)] * 3
    areas[lost] = frames(0) & frames(1)
    own, out = moved(Between(away=0, to=1, rows=Some(*areas), keep_norm=keep_norm, where=HERE))
    assert torch.equal(out, own)


def test_both_prompts_must_be_in_the_call():
    with pytest.raises(PlanError, match="between prompts of one attention call. Got conditional prompt 1"):
        moved(Between(away=0, to=1), entries=1)
