"""Whole pipelines of every model family at toy size: real diffusers classes, random weights, real tokenizers.

Each module has `FAMILY` (the family's name), `pipeline(**kwargs)`, `latents(pipe, prompt, seed, steps, **call)` (the
stock call, guided), `GUIDED`, `LAYERS`, `CALLS_PER_STEP` (attention calls of the blocks in one guided step) and, where
one configuration is not enough, `VARIANTS` (name -> arguments of `pipeline`).
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

MODULES = ("cogvideox", "hunyuan", "mochi", "sd3", "flux", "wan")


@dataclass(frozen=True)
class Case:
    """A family in one configuration; imported when it is used, so that a broken one fails alone."""

    module: str
    variant: str = ""

    def __str__(self) -> str:
        return f"{self.module}-{self.variant}" if self.variant else self.module

    @property
    def toy(self) -> Any:
        """The module."""
        return importlib.import_module(f"tests.toys.{self.module}")

    def pipeline(self) -> Any:
        """A fresh pipeline."""
        return self.toy.pipeline(**self.toy.VARIANTS[self.variant] if self.variant else {})


def cases() -> list[Case]:
    """Every family, in its first configuration and in each variant."""
    return [Case(module, variant) for module in MODULES for variant in ("", *_variants(module))]


def _variants(module: str) -> tuple[str, ...]:
    try:
        variants = getattr(Case(module).toy, "VARIANTS", {})
    except ImportError:
        return ()  # its first configuration fails, and says why
    return tuple(name for name, arguments in variants.items() if arguments)
