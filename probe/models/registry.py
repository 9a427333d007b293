"""The one list of model families."""

from torch import nn

from probe.errors import ModelError
from probe.models.cogvideox import COGVIDEOX
from probe.models.family import Family
from probe.models.flux import FLUX
from probe.models.hunyuan import HUNYUAN
from probe.models.mochi import MOCHI
from probe.models.sd3 import SD3
from probe.models.wan import WAN

FAMILIES: tuple[Family, ...] = (COGVIDEOX, HUNYUAN, MOCHI, WAN, SD3, FLUX)


def family_of(model: nn.Module) -> Family:
    """The family of a transformer.

    Raises:
        ModelError: none of the known ones; lists them.
    """
    return family_named(type(model).__name__)


def family_named(transformer: str) -> Family:
    """The family whose transformer is the diffusers class of this name.

    Raises:
        ModelError: none of the known ones; lists them.
    """
    for family in FAMILIES:
        if transformer == family.transformer:
            return family
    raise ModelError(f"A model must belong to a known family. Got {transformer}. Known: {known()}.")


def known() -> str:
    """The families and the classes of their transformers, as text."""
    return ", ".join(f"{family.name} ({family.transformer})" for family in FAMILIES)
