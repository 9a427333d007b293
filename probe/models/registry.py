"""The one list of model families."""

from torch import nn

from probe.errors import ModelError
from probe.models.cogvideox import COGVIDEOX
from probe.models.family import Family

FAMILIES: tuple[Family, ...] = (COGVIDEOX,)


def family_of(model: nn.Module) -> Family:
    """The family of a transformer.

    Raises:
        ModelError: none of the known ones; lists them.
    """
    for family in FAMILIES:
        if type(model).__name__ == family.transformer:
            return family
    known = ", ".join(f"{family.name} ({family.transformer})" for family in FAMILIES)
    raise ModelError(f"A model must belong to a known family. Got {type(model).__name__}. Known: {known}.")
