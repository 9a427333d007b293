"""The operators of a recipe as data: what each changes in the attention, and where. No torch.

`recipes.build` makes handlers of them; further operators come from packages, see `recipes.language.registry`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, SerializeAsAny, Tag, WithJsonSchema
from pydantic_core import PydanticCustomError

from probe.errors import RecipeError
from recipes.language import registry
from recipes.language.area import Area
from recipes.language.operation import Operation
from recipes.language.operator_tensor import Extend, Filter, Rotate, Scale, Shift, Transfer
from recipes.language.operator_weight import (
    Bias,
    Identity,
    Lamic,
    Reuse,
    Reweight,
    Seg,
    Sparsify,
    Table,
    Temper,
    Window,
)
from recipes.language.part import Part, by_form


class Edited(Part):
    """The same call under further operators."""

    edited: list[Edit] = Field(min_length=1, description="operators of the variant alone")


Variant = Annotated[
    Annotated[Literal["identity", "uniform", "sharpest"], Tag("name")] | Annotated[Edited, Tag("Edited")],
    by_form("must be identity, uniform, sharpest or {edited: [operators]}", {str: "name"}, {"edited": "Edited"}),
]


class Fork(Operation):
    """Two ways at once: O <- (1 - strength) O + strength O of the variant."""

    op: Literal["fork"] = "fork"
    variant: Variant = Field(
        description="identity: O = V; uniform: the mean of V; sharpest: V of the largest weight; or further operators"
    )
    gate: Area | None = Field(default=None, description="soft weights per row on top of the strength; null: 1")
    merge: Literal["blend", "lse"] = Field(
        default="blend", description="blend: by the strength; lse: as if both sets of keys were in one softmax"
    )


class Skip(Operation):
    """Leave a part of a layer out (STG, SLG, Stable Flow)."""

    op: Literal["skip"] = "skip"
    what: Literal["block", "attention", "feed_forward"] = Field(default="block", description="what adds nothing")


BUILT_IN: dict[str, type[Operation]] = {
    kind.model_fields["op"].default: kind
    for kind in (
        *(Transfer, Extend, Bias, Table, Window, Reweight, Scale, Temper, Rotate),
        *(Fork, Shift, Filter, Skip, Reuse, Identity, Seg, Sparsify, Lamic),
    )
}
"""The operators that need no further package, by their op."""


def known() -> tuple[str, ...]:
    """The ops a recipe can name: the built-in ones and those of packages."""
    return (*BUILT_IN, *(name for name in registry.operator_names() if name not in BUILT_IN))


def _of_package(value: Any) -> Operation:
    if isinstance(value, Operation):
        return value
    if value["op"] not in registry.operator_names():
        raise PydanticCustomError("op", "must name a known operator", {"known": list(known())})
    try:
        return _model(value["op"]).model_validate(value)
    except RecipeError as error:
        raise PydanticCustomError("package", "{said}", {"said": str(error)}) from error


def _model(op: str) -> type[Operation]:
    model = registry.operator(op).model
    if not issubclass(model, Operation):
        raise RecipeError(
            f"The operator {op} must have a model that is an Operation. Got {model.__name__}. Mend its package."
        )
    return model


def _tag(value: Any) -> str | None:
    op = value.get("op") if isinstance(value, Mapping) else getattr(value, "op", None)
    if not isinstance(op, str):
        return None
    return op if op in BUILT_IN else "package"


_PACKAGE = {"type": "object", "required": ["op"], "properties": {"op": {"not": {"enum": list(BUILT_IN)}}}}

Edit = Annotated[
    Annotated[Transfer, Tag("transfer")]
    | Annotated[Extend, Tag("extend")]
    | Annotated[Bias, Tag("bias")]
    | Annotated[Table, Tag("table")]
    | Annotated[Lamic, Tag("lamic")]
    | Annotated[Window, Tag("window")]
    | Annotated[Reweight, Tag("reweight")]
    | Annotated[Scale, Tag("scale")]
    | Annotated[Temper, Tag("temper")]
    | Annotated[Rotate, Tag("rotate")]
    | Annotated[Fork, Tag("fork")]
    | Annotated[Shift, Tag("shift")]
    | Annotated[Filter, Tag("filter")]
    | Annotated[Skip, Tag("skip")]
    | Annotated[Reuse, Tag("reuse")]
    | Annotated[Identity, Tag("identity")]
    | Annotated[Seg, Tag("seg")]
    | Annotated[Sparsify, Tag("sparsify")]
    | Annotated[SerializeAsAny[Operation], BeforeValidator(_of_package), WithJsonSchema(_PACKAGE), Tag("package")],
    Discriminator(_tag, custom_error_type="form", custom_error_message="must be a mapping that names its op"),
]
"""Any operator, told apart by op; those of other packages are validated by their own models."""

for _part in (Edited, Fork):
    _part.model_rebuild()
