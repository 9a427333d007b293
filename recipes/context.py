"""What the builders of edits know of a run, and how they look up what a recipe names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from control.address import Area, BothHalves
from control.extract import ExtractMask
from control.sink import Sinks
from control.strength import strength_at
from ditctrl.segment import Segments
from ditctrl.sharing import Chunks, Window
from probe import region
from probe.errors import UsageError
from probe.layout import TokenLayout
from probe.plan import Handler
from probe.region import Region
from probe.site import Where
from recipes.build_area import (
    PLAIN,
    Branches,
    cells,
    extracted,
    from_file,
    joined,
    needed,
    on_video,
    refuse_empty,
    strength_of,
)
from recipes.language import area as spec
from recipes.language.guide import Renew
from recipes.language.operator import Operation
from recipes.language.recipe import Recipe
from recipes.language.span import Only, Span, chosen


@dataclass(frozen=True)
class Context:
    """The recipe, the model and the number of steps. `place` is where in the recipe a builder is, for errors; `role`
    the perturbed pass it is for, None outside of guides. `chunks` is how segments are spread over forwards. `extra`
    takes further handlers that edits need, each once: masks and banks.
    """

    recipe: Recipe
    steps: int
    layers: int
    heads: int
    layout: TokenLayout
    rope: bool
    segments: Segments | None = None
    window: Window | None = None
    chunks: Chunks | None = None
    place: str = "edits"
    role: str | None = None
    extra: list[Handler] = field(default_factory=list)
    masks: dict[str, Area] = field(default_factory=dict)

    @contextmanager
    def at(self, place: str) -> Iterator[Context]:
        """The same for one part of the recipe; what goes wrong there is said to go wrong there.

        Raises:
            UsageError: of the same class, with the place in front.
        """
        try:
            yield replace(self, place=place)
        except UsageError as error:
            said = str(error)
            named = said.startswith((place.split()[0], "masks."))
            raise error if named else type(error)(f"{place}: {said}") from error

    def prompt(self, name: str) -> int:
        """The number of a prompt."""
        return self.recipe.prompt_index(name)

    def span(self, span: Span, count: int, what: str, key: str | None = None) -> tuple[int, ...] | None:
        """The numbers a span selects; None for all. `key` is where the recipe says it, if not under `what`."""
        return None if span is None else chosen(span, count, f"{self.place.split()[0]}.{key or what}", what)

    def where(self, edit: Operation) -> Where:
        """The calls, heads and branches of an edit."""
        asked = None if edit.prompts is None else tuple(sorted(self.prompt(name) for name in edit.prompts))
        guided = {"both": None, "conditional": True, "unconditional": False}[edit.guidance]
        branches = Branches(asked, guided, self.role)
        layers, heads, key = edit.layers, edit.heads, None
        if edit.places is not None:
            layers, heads = (Only(only=sorted(set(some))) for some in zip(*edit.places, strict=True))
            key = "places"
        return Where(
            steps=self.span(edit.steps, self.steps, "steps"),
            layers=self.span(layers, self.layers, "layers", key),
            heads=self.span(heads, self.heads, "heads", key),
            branches=None if branches == Branches() else branches,
            kinds=None if edit.kinds is None else frozenset(edit.kinds),
        )

    def resolved(self, edit: Operation) -> Operation:
        """With DiTCtrl's own steps and layers in place of "auto"."""
        window = Window.scaled(self.steps, self.layers)
        auto = {key: (span.start, span.stop) for key, span in vars(window).items() if getattr(edit, key) == "auto"}
        return edit.model_copy(update=auto) if auto else edit

    def acting(self, edit: Operation) -> tuple[int, ...]:
        """The steps at which an edit changes anything: its own, without those of strength 0."""
        steps = None if edit.steps == "auto" else self.span(edit.steps, self.steps, "steps")
        every, strength = range(self.steps) if steps is None else steps, strength_of(edit.strength)
        return tuple(step for step in every if strength_at(strength, step, self.steps))

    def refuse_early(self, edit: Operation) -> None:
        """Nothing, for an edit with a step at which the masks it acts inside of are known: each is, after the first
        step at which it is looked for.

        Raises:
            UsageError: it has none, and would change nothing.
        """
        again = any(isinstance(one, Renew) for one in self.recipe.latents)  # with the masks of the run before
        for name in needed(edit.rows) | needed(getattr(edit, "gate", None)):
            mask = self.recipe.masks.get(name)
            if isinstance(mask, spec.WordMask) and self.role is None and not again:
                self._refuse_before(name, mask, self.acting(edit))

    def _refuse_before(self, name: str, mask: spec.WordMask, acting: tuple[int, ...]) -> None:
        first = (self.span(mask.steps, self.steps, "steps") or (0,))[0]
        if acting and acting[-1] <= first:
            raise UsageError(
                f"An edit inside of a mask must have a step after {first}, the first at which mask {name} is looked "
                f"for. Got steps {acting[0]} to {acting[-1]}. Let the edit go on longer, or the mask begin earlier."
            )

    def refuse_unrotated(self) -> None:
        """Nothing, for a model with positions that can be changed.

        Raises:
            UsageError: it does not rotate queries and keys.
        """
        if not self.rope:
            raise UsageError(
                "A change of positions must have a model that rotates queries and keys (RoPE). Got one that does not, "
                f"{self.recipe.model}. Leave it out, or name another model."
            )

    def address(self, edit: Operation) -> dict[str, Any]:
        """`strength` and `where` of an edit, and `rows` if it names some."""
        rows = {} if edit.rows is None else {"rows": self.area(edit.rows)}
        return {**rows, "strength": strength_of(edit.strength), "where": self.where(edit)}

    def area(self, area: spec.Area | None) -> Area | None:
        """An area; None stays.

        Raises:
            UsageError: frames or patches that the grid does not have, a mask of another size, or no token at all.
        """
        if area is None:
            return None
        made = self._made(area)
        if on_video(area):
            refuse_empty(made, self.layout)
        return made

    def _made(self, area: spec.Area) -> Area:
        if isinstance(area, str):
            return PLAIN[area]() if area in PLAIN else self.mask(area)
        if isinstance(area, spec.Words):
            words = region.words(*area.phrases)
            return BothHalves(words) if area.both_halves else words
        if isinstance(area, spec.Sinks):
            heads = self.span(area.sinks.heads, self.heads, "heads")
            return Sinks(area.sinks.threshold, area.sinks.tokens, heads)
        if isinstance(area, spec.Not):
            return self._rest(area.area)
        if isinstance(area, spec.All):
            return joined(self.areas(area.all), every=True)
        if isinstance(area, spec.AnyOf):
            return joined(self.areas(area.any), every=False)
        return cells(area, self.layout.grid)

    def areas(self, areas: Sequence[spec.Area]) -> list[Area]:
        """Several areas."""
        return [made for area in areas if (made := self.area(area)) is not None]

    def mask(self, name: str) -> Area:
        """A named mask; one that is found while the model runs is one handler, whoever uses it."""
        if name not in self.masks:
            with self.at(f"masks.{name}") as here:
                self.masks[name] = made = here.made(self.recipe.masks[name])
            if isinstance(made, ExtractMask):
                self.extra.append(made)
        return self.masks[name]

    def made(self, mask: spec.Mask) -> Area:
        """The area of a mask. With segments or windows a word mask is each branch's own, else that of one prompt."""
        if isinstance(mask, spec.FileMask):
            return from_file(mask, self.layout.grid)
        if not isinstance(mask, spec.WordMask):
            return cells(mask, self.layout.grid)
        own = self.segments is not None or self.recipe.windows is not None
        if own and mask.prompt is not None:
            raise UsageError(f"A mask of segments must be each segment's own. Got prompt {mask.prompt}. Leave it out.")
        source = None if own else 0 if mask.prompt is None else self.prompt(mask.prompt)
        steps, layers = self.span(mask.steps, self.steps, "steps"), self.span(mask.layers, self.layers, "layers")
        video = None if mask.outputs_of is None else self.prompt(mask.outputs_of)
        return extracted(mask, source, Where(steps=steps, layers=layers), video)

    def _rest(self, area: spec.Area) -> Area:
        """The video outside of an area of the video, the tokens outside of any other."""
        inner = self.area(area)
        assert inner is not None
        return region.video() & ~inner if isinstance(inner, Region) and on_video(area) else ~inner
