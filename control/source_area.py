"""Which tokens of a source lie in an area: looked up where the source is, not its target."""

from __future__ import annotations

import torch
from torch import Tensor

from control.address import Area, Side, inside
from control.bank import Given
from control.source import Recalled
from probe.call import AttentionCall
from probe.errors import UsageError
from probe.layout import TokenLayout
from probe.region import Region
from probe.word import Prompt


def inside_source(area: Area, call: AttentionCall, given: Given, side: Side) -> Tensor:
    """bool [N] or [M]: the rows or columns of a source in an area, without text that is hidden. Words are those of the
    prompt that the source shows; its unconditional half shows none.

    Raises:
        UsageError: the area is found while the model runs, and the source is of another call.
        WordError: words of a bank, whose prompts are not known.
    """
    known = not isinstance(given, Recalled)
    if known and given.site == call.site and given.branch in call.branches:
        return inside(area, call, call.branches.index(given.branch), side)
    if not isinstance(area, Region):
        raise UsageError(
            f"An area of a source in another call must be a region. Got {area}, which is found in the call at hand. "
            "Generate source and target in one batch."
        )
    whole: TokenLayout = getattr(given, side)
    seen = whole.with_text(whole.text - (given.columns.total - given.visible)) if whole.text else whole
    prompt = None if given.branch.guided else Prompt.blank(seen.text)
    if given.branch.guided and known and given.branch.nearest < len(call.prompts):
        prompt = call.prompts[given.branch.nearest].first(seen.text)
    within = torch.zeros(whole.total, dtype=torch.bool, device=call.q.device)
    within[: seen.total] = torch.as_tensor(area.mask(seen, prompt), device=call.q.device)
    return within
