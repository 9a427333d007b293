"""All that a recipe does to a run, ready to be carried out: edits, guides and changes of the latents, checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace

from control.address import Area
from control.bank import Bank
from control.extract import ExtractMask
from control.guide import Guide, passes
from control.latent import Blend, LatentEdit
from control.noise import LowPass, NoiseShuffle, Nudge
from control.reuse import Reuse
from probe.errors import PlanError, UsageError
from probe.plan import Handler, Plan
from probe.site import Branch, Where, chosen
from recipes.build import build, of_prompts
from recipes.build_area import Branches, strength_of
from recipes.context import Context
from recipes.language import guide as spec
from recipes.language.operator import Operation, Transfer
from recipes.language.source import PREVIOUS


@dataclass(frozen=True)
class Again:
    """The run once more from `step`, `times` times: what is slow in its result, with fresh noise for what is fine."""

    low_pass: LowPass
    step: int
    times: int


@dataclass(frozen=True)
class Change:
    """The handlers that one edit of a recipe became, and where it changes anything (they may look at more)."""

    handlers: tuple[Handler, ...]
    where: Where


@dataclass(frozen=True)
class Program:
    """The edits by their place in the recipe ("edits.0 transfer"), the handlers they share (masks, banks), the guides,
    the changes of the latents, whether the run is repeated, and the masks by name.
    """

    edits: Mapping[str, Change]
    shared: tuple[Handler, ...] = ()
    guides: tuple[Guide, ...] = ()
    latents: tuple[LatentEdit, ...] = ()
    again: Again | None = None
    masks: Mapping[str, Area] = field(default_factory=dict)

    @property
    def handlers(self) -> tuple[Handler, ...]:
        """All of them."""
        return (*self.shared, *(handler for change in self.edits.values() for handler in change.handlers))

    @property
    def carries(self) -> str:
        """What outlives a step beside the latents, in words; a run with any of it cannot go on once it stopped."""
        kinds = {"masks of its own attention": ExtractMask, "the reuse of attention": Reuse}
        held = [name for name, kind in kinds.items() if any(isinstance(one, kind) for one in self.handlers)]
        held += ["tensors of earlier steps"] if any(isinstance(one, Bank) for one in self.shared) else []
        return " and ".join([*held, *(["noise that is renewed"] if self.again else [])])


def program(context: Context) -> Program:
    """The program of a recipe.

    Raises:
        UsageError: an edit does not fit the model or the run; its place in the recipe is named.
    """
    recipe, edits = context.recipe, dict[str, Change]()
    for number, edit in enumerate(recipe.edits):
        with context.at(f"edits.{number} {edit.op}") as here:
            edits[here.place] = _change(edit, here)
    guides = tuple(_guide(number, context) for number in range(len(recipe.guides)))
    for number in range(len(guides)):
        edits |= _perturbations(number, guides, context)
    latents = tuple(made for number in range(len(recipe.latents)) for made in _latents(number, context))
    for name in recipe.record.masks if recipe.record else ():
        context.mask(name)
    return Program(edits, tuple(context.extra), guides, latents, _again(context), context.masks)


def _change(edit: Operation, context: Context) -> Change:
    made = tuple(build(edit, context))
    shares = isinstance(edit, Transfer) and edit.source == PREVIOUS
    where = (
        Where(branches=Branches(role="target"), heads=context.span(edit.heads, context.heads, "heads"))
        if shares
        else context.where(context.resolved(edit))
    )
    return Change(made, where)


def _guide(number: int, context: Context) -> Guide:
    guide = context.recipe.guides[number]
    with context.at(f"guides.{number}") as here:
        prompts = None if guide.prompts is None else tuple(map(here.prompt, guide.prompts))
        steps = here.span(guide.steps, here.steps, "steps")
        return Guide(strength_of(guide.weight), guide.name, steps, prompts)


def _perturbations(number: int, guides: Sequence[Guide], context: Context) -> dict[str, Change]:
    """What a guide perturbs its pass by, only where there is one; nothing where its weights leave none in any step."""
    guide, made = context.recipe.guides[number], dict[str, Change]()
    runs = _passes(guide.name, guides, context)
    around = replace(context, role=guide.name) if any(runs) else replace(context, role=guide.name, extra=[], masks={})
    for inner, edit in enumerate(guide.perturb):
        with around.at(f"guides.{number}.perturb.{inner} {edit.op}") as here:
            change = _change(of_prompts(edit, guide.prompts), here)
            made[here.place] = _within(runs, change) if any(runs) else Change((), change.where)
    return made


def _passes(role: str, guides: Sequence[Guide], context: Context) -> list[list[Branch]]:
    """The perturbed branches of a role in each step; guides of one role share them."""
    plain = [Branch(prompt=number) for number in range(len(context.recipe.texts))]
    found = [passes(guides, plain, step, context.steps) for step in range(context.steps)]
    return [[replace(plain[row], role=role) for one, row in made if one == role] for made in found]


def _within(runs: Sequence[Sequence[Branch]], change: Change) -> Change:
    """A change in those of its steps that have a branch of it; whole if none has, to be refused by its place."""
    kept = []
    for handler in change.handlers:
        asked = chosen(handler.where.steps, len(runs))
        steps = tuple(step for step in asked if _any_of(change, runs[step]))
        if steps and steps != asked:
            handler.where = replace(handler.where, steps=steps)
        kept += [handler] if steps else []
    return Change(tuple(kept) or change.handlers, change.where)


def _any_of(change: Change, branches: Sequence[Branch]) -> bool:
    """Whether a change is for one of these branches."""
    pick = change.where.branches
    return any(pick is None or pick(branch) for branch in branches)


def _latents(number: int, context: Context) -> Iterator[LatentEdit]:
    edit = context.recipe.latents[number]
    if isinstance(edit, spec.Nudge):
        yield Nudge(edit.factor)
    if isinstance(edit, spec.Shuffle):
        yield NoiseShuffle(edit.window, edit.stride, edit.seed)
    if isinstance(edit, spec.Blend):
        with context.at(f"latents.{number} blend") as here:
            source = here.prompt(edit.source)
            others = [name for name in context.recipe.prompt_names if name != edit.source]
            masks = tuple(here.areas(edit.masks))
            steps = here.span(edit.steps, here.steps, "steps")
            for name in edit.prompts or others:
                yield Blend(source, here.prompt(name), masks, steps)


def _again(context: Context) -> Again | None:
    found = [(number, one) for number, one in enumerate(context.recipe.latents) if isinstance(one, spec.Renew)]
    if not found:
        return None
    (number, renew), *more = found
    if more or renew.step >= context.steps:
        got = "several" if more else f"step {renew.step} of {context.steps}"
        raise UsageError(f"latents.{number} renew: A run must be renewed by one rule, at a step it has. Got {got}.")
    return Again(LowPass(renew.time, renew.space, renew.shape, renew.order), renew.step, renew.times)


def check(
    made: Program, bind: Callable[[Sequence[Handler]], Plan], runs: Sequence[Sequence[Branch]], heads: int
) -> None:
    """Refuse a program that cannot work: edits that select nothing, or two that change the same tensor at one place.

    `bind` makes the plan of some handlers for the model and the run; `runs` are the branches that each step has.

    Raises:
        PlanError: names the edit in the recipe.
    """
    before: list[tuple[Change, Handler]] = []
    branches = tuple(dict.fromkeys(branch for step in runs for branch in step))
    for place, change in made.edits.items():
        try:
            for handler in change.handlers:
                bind([handler])
                _refuse_unmet(change, handler, runs)
                for other, earlier in before:
                    if _meet(change, other, branches, heads):
                        bind([_everywhere(earlier), _everywhere(handler)])
        except UsageError as error:
            raise type(error)(f"{place}: {error}") from error
        before += [(change, handler) for handler in change.handlers]


def _refuse_unmet(change: Change, handler: Handler, runs: Sequence[Sequence[Branch]]) -> None:
    if not any(_any_of(change, runs[step]) for step in chosen(handler.where.steps, len(runs))):
        raise PlanError(
            f"An edit must be for a pass that the run makes in one of its steps. Got {handler}, which is for none. "
            "Check its steps, prompts and guidance: a perturbed pass is made in the steps of its guide, and the "
            "unconditional half with a guidance above 1."
        )


def _meet(one: Change, other: Change, branches: Sequence[Branch], heads: int) -> bool:
    """Whether two changes have a branch and a head in common."""
    a, b = one.where, other.where
    both = any(all(pick is None or pick(branch) for pick in (a.branches, b.branches)) for branch in branches)
    return both and bool(set(chosen(a.heads, heads)) & set(chosen(b.heads, heads)))


def _everywhere(handler: Handler) -> Handler:
    """The same for all branches and heads: it is known that they meet."""
    alone = copy(handler)
    alone.where = replace(handler.where, branches=None, heads=None)
    return alone
