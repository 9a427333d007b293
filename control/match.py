"""Match: which row of a source each row of a target resembles most."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from control.address import Area
from control.bank import Given
from control.place import Partners, side_of
from control.source import Ask, Itself, OfBranch, Source, source_of
from control.source_area import inside_source
from probe import attend
from probe.call import AttentionCall
from probe.errors import PlanError, UsageError

_CHUNK_BYTES = 2**26
"""Most memory that cosines take at once."""


@dataclass(frozen=True, eq=False)
class Match:
    """The nearest neighbour of each video row among the video rows of a source, pi(i) = argmax_j cos(a_i, b_j), as the
    mapping of a Transfer; where the cosine is not above `threshold` the row keeps its own. Text rows keep their own.

    `features` is one of q, k, v, o: the vector of a row over all heads of the Transfer. b are those of `source` (None:
    what the Transfer takes from), of its rows in `among` if given (keyframes, an object); a are those of `of` (None:
    the target itself). TokenFlow (arXiv 2307.10373) takes both from the source and moves the target's own outputs;
    CharaConsist (2507.11533) and DiffUHaul (2406.01594) match a target with its source.

    Exact and chunked; cost: N_video^2 products of D H numbers, about half of an attention.

    Raises:
        UsageError: another feature; (when served) `among` is found while the model runs, and the source is of another
            call.
        PlanError: (when served) o before the attention ran: use features of o in a Transfer of o.
    """

    source: int | OfBranch | Source | None = None
    features: str = "k"
    threshold: float | None = None
    among: Area | None = None
    of: int | OfBranch | Source | None = None

    def __post_init__(self) -> None:
        if self.features not in ("q", "k", "v", "o"):
            raise UsageError(f"A Match must compare q, k, v or o. Got {self.features!r}. Choose one of them.")
        for name in ("source", "of"):
            given = getattr(self, name)
            object.__setattr__(self, name, None if given is None else source_of(given))

    def __str__(self) -> str:
        return f"Match({self.features})" if self.threshold is None else f"Match({self.features} > {self.threshold:g})"

    @property
    def sources(self) -> tuple[Source, ...]:
        """The sources of its own."""
        return tuple(one for one in (self.source, self.of) if isinstance(one, Source))

    def partners(self, given: Given, call: AttentionCall, entry: int, heads: tuple[int, ...]) -> Partners:
        """The partners of the video of an entry; `given` is what the Transfer takes from."""
        ask = Ask(self.features, heads)
        theirs = self.source.given(call, entry, ask) if isinstance(self.source, Source) else given
        mine = self.of.given(call, entry, ask) if isinstance(self.of, Source) else Itself().given(call, entry, ask)
        if theirs is None or mine is None:
            raise PlanError(
                f"A Match must have a source for each target. Got none for {call.branches[entry]} at {call.site}. Let "
                "the function give a branch, or leave the target out of the Transfer."
            )
        a, b = (self._vectors(one, heads) for one in (mine, theirs))
        index, cosine = nearest(a, b, self._candidates(call, theirs))
        weight = torch.ones_like(cosine) if self.threshold is None else (cosine > self.threshold).to(cosine.dtype)
        return Partners(index, weight.to(call.q.dtype), text=False)

    def _vectors(self, given: Given, heads: tuple[int, ...]) -> Tensor:
        """[N_video, h D]."""
        video = given.layout(self.features).video_slice
        return given.take(self.features, heads)[:, video].transpose(0, 1).flatten(1)

    def _candidates(self, call: AttentionCall, theirs: Given) -> Tensor | None:
        """bool [N_video] of the source."""
        if self.among is None:
            return None
        video = theirs.layout(self.features).video_slice
        return inside_source(self.among, call, theirs, side_of(self.features))[video]


def nearest(a: Tensor, b: Tensor, among: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """For each row of a [n, C] the row of b [m, C] with the largest cosine, of those with `among` (bool [m], None:
    all): its number, long [n], and the cosine, [n] in float32 (float64 for float64).

    Raises:
        PlanError: no row to choose from.
    """
    if len(b) == 0 or (among is not None and not bool(among.any())):
        raise PlanError("A Match must have rows to choose from. Got none. Widen its among.")
    a, b = (F.normalize(x.to(attend.exact_dtype(x.dtype)), dim=-1) for x in (a, b))
    step = max(1, _CHUNK_BYTES // (len(b) * a.element_size()))
    index, cosine = [], []
    for at in range(0, len(a), step):
        scores = a[at : at + step] @ b.mT
        if among is not None:
            scores = scores.masked_fill(~among, -torch.inf)
        best = scores.max(-1)
        index.append(best.indices)
        cosine.append(best.values)
    return torch.cat(index), torch.cat(cosine)
