"""The word masks of a run, as they were at its end."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from control.extract import ExtractMask
from recipes.program import Program


def masks_of(made: Program) -> dict[str, NDArray[np.bool_]]:
    """Those that found something, by name, bool [F, Y, X]; a mask of each branch's own is that of the first prompt."""
    named = {name: mask for name, mask in made.masks.items() if isinstance(mask, ExtractMask)}
    found = {name: mask.mask(mask.source if isinstance(mask.source, int) else 0) for name, mask in named.items()}
    return {name: mask for name, mask in found.items() if mask is not None}


def write(made: Program, folder: Path) -> None:
    """Each as mask_<name>.npz, which `mmdit mask --against` and masks of further recipes read."""
    for name, mask in masks_of(made).items():
        np.savez_compressed(folder / f"mask_{name}.npz", mask=mask)
