"""A story as numbers for the model at hand: its segments, and where they share."""

from __future__ import annotations

from dataclasses import replace

from ditctrl.duration import lasting
from ditctrl.segment import TRANSITIONS, Segments
from ditctrl.sharing import Window
from probe.errors import UsageError
from recipes.language.operator import Transfer
from recipes.language.recipe import Recipe
from recipes.language.source import PREVIOUS
from recipes.language.span import Span, chosen
from recipes.size import Clip


def segments_of(recipe: Recipe, clip: Clip) -> tuple[Segments | None, Segments | None]:
    """The segments of a recipe, None where it has none; and, where they are clips by themselves, the connected ones
    that these are compared with.

    Raises:
        UsageError: numbers that do not fit the prompts or the model.
    """
    if recipe.segments is None:
        return None, None
    made = _lasting(recipe, _scaled(recipe, clip), clip)
    return (replace(made, overlap=0, transitions=0, repeats=()), made) if _isolated(recipe) else (made, None)


def _scaled(recipe: Recipe, clip: Clip) -> Segments:
    """The geometry, without durations."""
    assert recipe.segments
    overlap = None if recipe.segments.overlap == "auto" else recipe.segments.overlap
    for name, given in (("guides", recipe.guides), ("latents", recipe.latents)):
        if given:
            raise UsageError(
                f"A recipe with segments must have no {name}: the segments share one long latent. Got {len(given)}. "
                "Leave one of the two out."
            )
    asked, count = recipe.segments, len(recipe.prompts)
    if asked.times is not None and count > 1:
        raise UsageError(
            f"segments.times must be of a single prompt. Got {count} prompts. Leave it out, or all prompts but one."
        )
    if asked.middle and count < 3:
        raise UsageError(
            f"segments.middle must be of prompts between the first and the last. Got {count} prompts. Say "
            "segments.durations, or add a prompt."
        )
    transitions = None if asked.transitions == "auto" else asked.transitions
    if count == 1 and (asked.times or asked.durations):
        between = TRANSITIONS[asked.variant] if transitions is None else transitions
        repeats = Segments.alone(asked.times or 2, between)
    else:
        repeats = ()
    return Segments.scaled(count, clip.frames, transitions, overlap, asked.variant, repeats).middle(asked.middle)


def _lasting(recipe: Recipe, made: Segments, clip: Clip) -> Segments:
    """As long as the recipe says, if it does."""
    asked = recipe.segments
    if asked is None or asked.durations is None:
        return made
    unit = recipe.output.fps if asked.unit == "seconds" else 1
    pixels = [duration * unit for duration in asked.durations]
    return lasting(made, [clip.latents_of(frames, first=not number) for number, frames in enumerate(pixels)])


def _isolated(recipe: Recipe) -> bool:
    """Whether the segments are clips by themselves."""
    alone = recipe.segments is not None and recipe.segments.isolated
    if alone and any(isinstance(edit, Transfer) and edit.source == PREVIOUS for edit in recipe.edits):
        raise UsageError(
            "Isolated clips must not take from the previous segment. Got a transfer from previous_segment. Leave out "
            "one of the two."
        )
    return alone


def window_of(recipe: Recipe, steps: int, layers: int) -> Window | None:
    """Where segments share; None without sharing, or where its window is empty.

    Raises:
        UsageError: several transfers that share, or steps or layers with gaps.
    """
    shared = [
        (number, edit)
        for number, edit in enumerate(recipe.edits)
        if isinstance(edit, Transfer) and edit.source == PREVIOUS
    ]
    if not shared:
        return None
    if len(shared) > 1:
        raise UsageError(f"A recipe must have one transfer from previous_segment. Got {len(shared)}. Join them.")
    number, edit = shared[0]
    assert recipe.segments
    auto = Window.scaled(steps, layers, recipe.segments.variant)
    window = Window(
        auto.steps if edit.steps == "auto" else range_of(edit.steps, steps, f"edits.{number}.steps", "steps"),
        auto.layers if edit.layers == "auto" else range_of(edit.layers, layers, f"edits.{number}.layers", "layers"),
    )
    return window if window.steps and window.layers else None


def range_of(span: Span, n: int, name: str, what: str) -> range:
    """A span without gaps.

    Raises:
        UsageError: it has some.
    """
    found = chosen(span, n, name, what)
    if found[-1] - found[0] >= len(found):
        raise UsageError(f"{name} must be one range for previous_segment. Got {list(found)}. Write [start, stop).")
    return range(found[0], found[-1] + 1)
