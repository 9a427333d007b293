"""Transfers of a recipe: from a prompt, from the segment before, and the object apart from the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from control.transfer import Transfer
from ditctrl.objects import OfPrompts, OfSegments, Pairing, pairs
from ditctrl.sharing import share_previous, shared_where
from ditctrl.wordmask import WordMasks, keep_apart, up_to
from probe.errors import UsageError
from probe.plan import Handler
from probe.site import Where, chosen
from recipes.build_source import mapping_of, source_of
from recipes.context import Context
from recipes.language import operator as spec
from recipes.language.source import PREVIOUS


def transfer(edit: spec.Transfer, context: Context) -> Sequence[Handler]:
    """The handlers of a transfer; masks of objects are added to `context.extra`.

    Raises:
        UsageError: it does not fit the model or the run.
    """
    if edit.source == PREVIOUS:
        return _previous(edit, context)
    if edit.positions == "target":
        context.refuse_unrotated()
    source = source_of(edit.source, edit.tensors, edit, context)
    mapping = mapping_of(edit.mapping, context.layout.grid)
    gate = context.area(edit.gate)
    positions, address = edit.positions, context.address(edit)
    made = [
        Transfer(tensors, source, gate=gate, mapping=mapping, positions=positions, **address)
        for tensors in _apart(edit.tensors)
    ]
    if edit.objects is None:
        return made
    assert isinstance(edit.source, str)
    names, given = context.recipe.prompt_names, edit.objects
    phrases = (given,) * len(names) if isinstance(given, str) else tuple(map(str, given))
    return [*made, _apart_by_objects(edit, OfPrompts(context.prompt(edit.source), phrases), address, context)]


def _apart_by_objects(edit: spec.Transfer, pairing: Pairing, address: dict[str, Any], context: Context) -> Handler:
    """Objects look at objects; their masks are one more handler."""
    where, paper = address["where"], context.segments is not None and context.segments.variant == "paper"
    steps, layers = (chosen(span, n) for span, n in ((where.steps, context.steps), (where.layers, context.layers)))
    seen = Where(steps=steps, layers=up_to(layers))
    masks = WordMasks(pairing, seen, edit.threshold, "mean" if paper else "vt")
    context.extra.append(masks)
    return keep_apart(masks, **address)


def _apart(tensors: str) -> list[str]:
    """The output is transferred by itself."""
    return [part for part in (tensors.replace("o", ""), "o" if "o" in tensors else "") if part]


def _previous(edit: spec.Transfer, context: Context) -> Sequence[Handler]:
    """DiTCtrl's KV sharing, inside its window: the branches and their sources are its own."""
    if context.segments is None or context.window is None:
        return []
    if edit.prompts is not None or edit.guidance != "both":
        raise UsageError("A transfer from previous_segment must be for all prompts and both halves. Leave them out.")
    address = context.address(edit.model_copy(update={"steps": None, "layers": None}))
    address["where"], gate = shared_where(context.window, address["where"].heads), context.area(edit.gate)
    made = share_previous(context.segments, edit.tensors, context.chunks, gate=gate, **address)
    if edit.objects is None:
        return [made]
    objects = OfSegments(context.segments, pairs(context.segments.prompts, edit.objects))
    return [made, _apart_by_objects(edit, objects, address, context)]
