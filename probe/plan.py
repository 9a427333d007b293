"""Handlers, and the plan that matches them to attention calls: once, before the first call.

The plan knows stages, tensors and places; it does not know operators.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Sequence
from enum import IntEnum

from torch import Tensor

from probe.call import AttentionCall
from probe.errors import PlanError, UsageError
from probe.layout import TokenLayout
from probe.site import KINDS, Branch, Site, Where, chosen
from probe.word import Prompt


class Stage(IntEnum):
    """When in a call a handler is served. The attention itself runs between EDIT and USED."""

    BEFORE = 1  # readouts of the model's own tensors
    EDIT = 2  # Rotate, Transfer, Extend, Scale, Bias
    USED = 3  # readouts of the attention that the model really uses
    MERGE = 4  # changes of the output


class Handler(ABC):
    """Something served at attention calls: a readout (touches nothing) or an intervention.

    `touches` names the tensors it changes (q, k, v, out); `rank` orders edits of one stage; two edits of the same
    rank on the same tensor, rows and heads of one call clash. `kinds` are the kinds of attention it can be served at,
    None for any; `composes`: it may meet another of its kind at the same place, in any order. `needs_lse` and
    `in_parts` say what it will ask of a call, so that the attention can be computed once in the form that gives it.
    """

    where: Where
    stage: Stage
    touches: frozenset[str] = frozenset()
    rank: int = 0
    composes: bool = False
    rows: object = None
    kinds: frozenset[str] | None = None
    needs_lse: bool = False
    in_parts: bool = False

    def begin(self, prompts: Sequence[Prompt], steps: int, layers: int) -> None:  # noqa: B027 (optional)
        """Called once when a run starts. Forget the last run; refuse what cannot work."""

    def end(self) -> None:  # noqa: B027 (optional)
        """Called once when a run ends, also after an error. Let go of what was kept for the next call."""

    @abstractmethod
    def serve(self, call: AttentionCall, rows: tuple[int, ...]) -> None:
        """Read or rewrite `call` for its batch entries `rows` (never empty)."""

    def extent(self, call: AttentionCall, row: int) -> Tensor | None:
        """The tokens of a batch entry an edit changes, bool [N]; None for all."""
        return None

    def met(self, call: AttentionCall, rows: tuple[int, ...]) -> bool:
        """Whether being served here counts: a handler may also be served where it only looks for a source."""
        return True

    def treats(self, branch: Branch) -> Hashable:
        """What an edit does to a branch, as far as the branch decides: by default, whether it is selected."""
        return bool(self.where.rows((branch,)))

    def cost(self, layout: TokenLayout) -> float:
        """Predicted extra work per matched call, as a share of the plain attention of the rows concerned."""
        return 0.0

    def execution(self, layout: TokenLayout) -> str:
        """How a matched call will be computed, in a few words; empty if there is nothing to say."""
        return ""

    def __str__(self) -> str:
        return type(self).__name__


class Plan:
    """Handlers bound to a model of `layers` layers and a run of `steps` steps.

    `places` are the (layer, kind) of its attention modules, or every layer has all `kinds`; `heads` is how many heads
    each has, None if not known.

    After a run `how` counts by site and way how the attention of calls with changed weights was computed. `fuse` lets
    readouts that measure in parts also produce the output of their calls: cheaper, equal up to rounding.

    Raises:
        PlanError: a handler selects no call at all, or two edits clash; both are named.
    """

    def __init__(
        self,
        handlers: Iterable[Handler],
        steps: int,
        layers: int,
        prompts: Sequence[Prompt] = (),
        kinds: Collection[str] = ("joint",),
        places: Collection[tuple[int, str]] | None = None,
        heads: int | None = None,
        fuse: bool = False,
    ) -> None:
        self.handlers = tuple(sorted(handlers, key=lambda h: (h.stage, h.rank)))
        self.steps, self.layers, self.heads, self.fuse = steps, layers, heads, fuse
        self.places = frozenset(places or ((layer, kind) for layer in range(layers) for kind in kinds))
        self.how: Counter[tuple[Site, str]] = Counter()
        self._served: Counter[int] = Counter()
        self._cache: dict[Site, tuple[Handler, ...]] = {}
        for handler in self.handlers:
            handler.begin(prompts, steps, layers)
            self._refuse_nothing(handler)
            self._refuse_kind(handler)
        self._refuse_clashes()

    def at(self, site: Site) -> tuple[Handler, ...]:
        """The handlers of a call in the order they are served."""
        if site not in self._cache:
            self._cache[site] = tuple(
                h
                for h in self.handlers
                if h.where.at(site, self.steps, self.layers) and (h.kinds is None or site.kind in h.kinds)
            )
        return self._cache[site]

    def apart(self, step: int, turn: int, groups: Sequence[Sequence[Branch]]) -> int:
        """The first layer at which an edit treats branches of a group differently; `layers` if none does."""
        for layer, kind in sorted(self.places):
            for handler in self.at(Site(step, turn, layer, 0, kind)):
                if handler.touches and any(len(set(map(handler.treats, one))) > 1 for one in groups):
                    return layer
        return self.layers

    def served(self, handler: Handler) -> None:
        """Count that a handler met a call."""
        self._served[id(handler)] += 1

    def refuse_unmet(self, first_step: int = 0) -> None:
        """After a run: raise if a handler met no call, so that nothing is a silent no-op.

        A run resumed at `first_step` does not ask for handlers whose steps lie before.
        """
        for handler in self.handlers:
            due = max(chosen(handler.where.steps, self.steps)) >= first_step
            if due and not self._served[id(handler)]:
                raise PlanError(
                    f"A handler must meet at least one attention call. Got {handler}, which met none in this run. "
                    "Check its steps, layers and branches."
                )

    def explain(self, step: int, layer: int, layout: TokenLayout | None = None) -> str:
        """What happens at a call, one line per handler, in order; with a layout also how it will be computed."""
        handlers = list(dict.fromkeys(h for kind in sorted(self.kinds) for h in self.at(Site(step, 0, layer, 0, kind))))
        handlers.sort(key=self.handlers.index)
        before = [line for h in handlers if h.stage <= Stage.EDIT for line in _said(h, layout)]
        after = [line for h in handlers if h.stage > Stage.EDIT for line in _said(h, layout)]
        return "\n".join([f"step {step} layer {layer}:", *before, "  attention", *after])

    def cost(self, layout: TokenLayout) -> float:
        """Predicted extra attention work of the whole run, as a share of its plain attention."""
        work = 0.0
        for handler in self.handlers:
            calls = len(chosen(handler.where.steps, self.steps)) * len(self._matched(handler))
            heads = len(chosen(handler.where.heads, self.heads)) / self.heads if self.heads else 1.0
            work += handler.cost(layout) * calls * heads
        return work / (self.steps * len(self.places))

    def _refuse_nothing(self, handler: Handler) -> None:
        spans = {"steps": (handler.where.steps, self.steps), "layers": (handler.where.layers, self.layers)}
        if self.heads is not None:
            spans["heads"] = (handler.where.heads, self.heads)
        for name, (span, count) in spans.items():
            try:
                some = chosen(span, count)
            except UsageError as error:
                raise PlanError(f"The {name} of {handler} do not fit this model. {error}") from error
            if not some:
                raise PlanError(
                    f"A handler must select at least one attention call. Got {handler}, which selects none of {count} "
                    f"{name}. Widen its where."
                )

    def _matched(self, handler: Handler) -> set[tuple[int, str]]:
        """The (layer, kind) a handler is served at."""
        layers, asked = set(chosen(handler.where.layers, self.layers)), handler.where.kinds
        return {
            (layer, kind)
            for layer, kind in self.places
            if layer in layers and (asked is None or kind in asked) and (handler.kinds is None or kind in handler.kinds)
        }

    @property
    def kinds(self) -> frozenset[str]:
        """The kinds of attention the model has."""
        return frozenset(kind for _, kind in self.places)

    def _refuse_kind(self, handler: Handler) -> None:
        if not self._matched(handler):
            can = sorted(handler.kinds or KINDS)
            raise PlanError(
                f"A handler must select attention of a kind it can read. Got {handler}, which reads {', '.join(can)} "
                f"attention, in a model with {', '.join(sorted(self.kinds))} attention, at layers and kinds that it "
                "does not have together. Widen its where, or choose another."
            )

    def _refuse_clashes(self) -> None:
        edits = [h for h in self.handlers if h.touches]
        for i, one in enumerate(edits):
            for other in edits[i + 1 :]:
                if self._clash(one, other):
                    raise PlanError(
                        f"Two edits must not change the same tensor at the same place. Got {one} and {other}. "
                        "Separate their steps, layers, heads or branches."
                    )

    def _clash(self, one: Handler, other: Handler) -> bool:
        if (one.stage, one.rank) != (other.stage, other.rank) or not one.touches & other.touches:
            return False
        if one.composes and other.composes:
            return False
        a, b = one.where, other.where
        pairs = ((a.branches, b.branches), (a.heads, b.heads), (a.turns, b.turns))
        addressed = one.rows is not None and other.rows is not None
        if addressed or any(x is not None and y is not None and x != y for x, y in pairs):
            return False  # told apart, or refused when a call shows that they overlap
        if a.kinds is not None and b.kinds is not None and not set(a.kinds) & set(b.kinds):
            return False
        spans = ((a.steps, b.steps, self.steps), (a.layers, b.layers, self.layers))
        return all(set(chosen(x, n)) & set(chosen(y, n)) for x, y, n in spans)


def _said(handler: Handler, layout: TokenLayout | None) -> list[str]:
    """The lines of a handler in an explanation."""
    how = "" if layout is None else handler.execution(layout)
    return [f"  {handler.stage.name.lower()}: {handler}", *([f"    {how}"] if how else [])]
