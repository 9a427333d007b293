"""From the operators of a recipe to the handlers of `control`: one small builder for each."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from control.best_band import BestBand
from control.between import Between
from control.bias import Bias, BiasTable
from control.closed_form import Identity, Sharpest, Uniform
from control.edit import Edit
from control.extend import Extend
from control.filter import Filter
from control.fork import Fork
from control.group import Subject, lamic
from control.perturb import BlurQuery, identity_attention, video_mass_to_self
from control.reuse import Reuse
from control.reweight import Reweight
from control.rotate import Rotate
from control.scale import Scale, Temper
from control.skip import Skip
from control.sparsify import Sparsify
from control.variant import Edited
from control.window import Band, Window
from probe.errors import MmditError, RecipeError
from probe.plan import Handler
from recipes.build_source import source_of
from recipes.build_transfer import transfer
from recipes.context import Context
from recipes.language import operator as spec
from recipes.language import registry
from recipes.language.source import PREVIOUS

AXES = ("frame", "row", "column")
Build = Callable[[Any, Context], Sequence[Handler]]


def build(edit: spec.Operation, context: Context) -> list[Handler]:
    """The handlers of one operator of a recipe; what else they need is added to `context.extra`.

    Raises:
        UsageError: it does not fit the model or the run.
        RecipeError: its package cannot be loaded, or builds no handlers.
    """
    make = BUILDERS.get(edit.op, _of_package)
    if getattr(edit, "source", None) != PREVIOUS:
        edit = context.resolved(edit)
    if edit.places is not None:
        context.where(edit)  # refused by the name it has in the recipe
    context.refuse_early(edit)
    return [handler for part in edit.by_layer() for handler in make(part, context)]


def _of_package(edit: spec.Operation, context: Context) -> list[Handler]:
    made: Any = None
    try:
        made = registry.operator(edit.op).build(edit, context)
        made = list(made) if isinstance(made, Sequence) and not isinstance(made, str) else made
        got = repr(made)
    except MmditError:
        raise
    except Exception as error:  # a package raises what it likes
        got = f"{type(error).__name__}: {error}"
    if isinstance(made, list) and made and all(isinstance(one, Handler) for one in made):
        return made
    raise RecipeError(
        f"The operator {edit.op} of {registry.origin(edit.op)} must build handlers. Got {got[:200]}. Mend that "
        "package, or uninstall it."
    )


def _bias(edit: spec.Bias, context: Context) -> Sequence[Handler]:
    return [Bias(edit.amount, context.area(edit.columns), **context.address(edit))]


def _table(edit: spec.Table, context: Context) -> Sequence[Handler]:
    groups = [context.area(group) for group in edit.groups]
    return [BiasTable([group for group in groups if group is not None], edit.values, **context.address(edit))]


def _lamic(edit: spec.Lamic, context: Context) -> Sequence[Handler]:
    subjects = []
    for one in edit.subjects:
        words, region = context.areas([one.text, one.region])
        subjects.append(Subject(words, region, context.area(one.reference)))
    return lamic(subjects, switch=edit.switch, **context.address(edit))


def _scale(edit: spec.Scale, context: Context) -> Sequence[Handler]:
    return [Scale(edit.tensor, edit.factor, **context.address(edit))]


def _temper(edit: spec.Temper, context: Context) -> Sequence[Handler]:
    return [Temper(edit.factor, **context.address(edit))]


def _fork(edit: spec.Fork, context: Context) -> Sequence[Handler]:
    gate = context.area(edit.gate)
    return [Fork(_variant(edit, context), gate=gate, merge=edit.merge, **context.address(edit))]


def _variant(edit: spec.Fork, context: Context) -> Any:
    if isinstance(edit.variant, str):
        return {"identity": Identity, "uniform": Uniform, "sharpest": Sharpest}[edit.variant]()
    made: list[Handler] = []
    for number, inner in enumerate(edit.variant.edited):
        with context.at(f"{context.place.split()[0]}.variant.edited.{number} {inner.op}") as here:
            made += build(of_prompts(inner, edit.prompts), here)
    return Edited(*(one for one in made if isinstance(one, Edit)))


def of_prompts(edit: spec.Operation, prompts: list[str] | None) -> spec.Operation:
    """An edit inside another one: for the prompts of that, unless it names its own."""
    return edit if edit.prompts is not None or prompts is None else edit.model_copy(update={"prompts": prompts})


def _identity(edit: spec.Identity, context: Context) -> Sequence[Handler]:
    address = context.address(edit)
    if edit.form == "whole":
        return [Fork(Identity(), **address)]
    return [video_mass_to_self(**address) if edit.form == "mass" else identity_attention("video", **address)]


def _seg(edit: spec.Seg, context: Context) -> Sequence[Handler]:
    sigma = math.inf if edit.sigma is None else edit.sigma
    return [BlurQuery(sigma, edit.over, **context.address(edit))]


def _window(edit: spec.Window, context: Context) -> Sequence[Handler]:
    address, made = context.address(edit), list[Handler]()
    if edit.frames is not None or edit.radius is not None:
        made.append(Window(frames=edit.frames, radius=edit.radius, shape=edit.shape, **address))
    if edit.band is not None and edit.order in ("best", "worst"):
        made.append(BestBand(edit.band, worst=edit.order == "worst", **address))
    elif edit.band is not None:
        made.append(Band(width=edit.band, order="spatial" if edit.order == "frame" else "temporal", **address))
    return made


def _reweight(edit: spec.Reweight, context: Context) -> Sequence[Handler]:
    columns, to = context.area(edit.columns), context.area(edit.to)
    assert columns is not None
    return [Reweight(columns, edit.factor, edit.mode, to=to, **context.address(edit))]


def _rotate(edit: spec.Rotate, context: Context) -> Sequence[Handler]:
    context.refuse_unrotated()
    axes, band = tuple(AXES.index(axis) for axis in edit.axes), _band(edit.band)
    return [Rotate(edit.tensors, edit.shift, drop=edit.drop, axes=axes, band=band, **context.address(edit))]


def _band(shares: tuple[float, float] | None) -> Any:
    """As a Rotate takes it: from one end of the frequencies."""
    if shares in (None, (0, 1)):
        return None
    start, stop = shares
    return ("low", 1 - start) if start else ("high", stop)


def _extend(edit: spec.Extend, context: Context) -> Sequence[Handler]:
    source = source_of(edit.source, "kv", edit, context)
    columns = context.area(edit.columns)
    return [Extend(source, columns=columns, bias=edit.bias, pool=edit.pool, **context.address(edit))]


def _shift(edit: spec.Shift, context: Context) -> Sequence[Handler]:
    away, to = context.prompt(edit.direction.source), context.prompt(edit.direction.target)
    return [Between(away=away, to=to, keep_norm=edit.keep_norm, **context.address(edit))]


def _filter(edit: spec.Filter, context: Context) -> Sequence[Handler]:
    axes = "".join("tyx"[AXES.index(axis)] for axis in dict.fromkeys(edit.axes))
    keep, gain = ("low", edit.high) if edit.low == 1 else ("high", edit.low)
    return [Filter(edit.tensor, axes, edit.cutoff, keep, gain, **context.address(edit))]


def _reuse(edit: spec.Reuse, context: Context) -> Sequence[Handler]:
    """The warm-up is what comes before its steps, the authors' 15 of 50 unless it says so."""
    address, frames = context.address(edit), context.layout.grid.frames
    chosen = address["where"].steps
    band = Band(width=edit.window * frames / 2, order="temporal", **address)
    warm = round(0.3 * context.steps) if chosen is None else chosen[0]
    return [Reuse(band, period=edit.every, warm=warm, drift=edit.drift)]


def _sparsify(edit: spec.Sparsify, context: Context) -> Sequence[Handler]:
    return [Sparsify(edit.keep, renormalise=edit.renormalise, **context.address(edit))]


def _skip(edit: spec.Skip, context: Context) -> Sequence[Handler]:
    return [Skip(edit.what, **context.address(edit))]


BUILDERS: Mapping[str, Build] = {
    "transfer": transfer,
    "bias": _bias,
    "table": _table,
    "lamic": _lamic,
    "scale": _scale,
    "temper": _temper,
    "fork": _fork,
    "identity": _identity,
    "seg": _seg,
    "window": _window,
    "reweight": _reweight,
    "rotate": _rotate,
    "skip": _skip,
    "extend": _extend,
    "shift": _shift,
    "filter": _filter,
    "reuse": _reuse,
    "sparsify": _sparsify,
}
"""The builder of each built-in operator."""
