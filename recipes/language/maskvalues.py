"""Masks from files, kept as text in the recipe: a run folder then holds all that its recipe needs. No torch."""

from __future__ import annotations

import base64
import binascii
import zlib
from pathlib import Path
from zipfile import BadZipFile, ZipFile

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from probe.errors import LayoutError, MmditError
from recipes import maskfile
from recipes.language.area import FileMask
from recipes.language.include import inside
from recipes.language.parse_tree import Tree

MOST_CELLS = 2**24
"""Of a mask: frames x rows x columns."""

Mask = NDArray[np.bool_]


def array_of(mask: FileMask) -> Mask:
    """The mask, bool [frames, rows, columns]; a picture has one frame.

    Raises:
        LayoutError: it has not been loaded, or its values are no mask.
    """
    if mask.values is None:
        raise LayoutError(
            f"A mask must be loaded with its recipe. Got {mask.file}. Load the recipe from YAML, or give its values: "
            "FileMask(values=recipes.language.maskvalues.text_of(mask))."
        )
    try:
        return _unpacked(mask.values)
    except (ValueError, zlib.error, binascii.Error) as error:
        raise LayoutError(
            f"The values of a mask must be as they were written. Got {mask.values[:40]!r}: {error}. Leave them out to "
            "read the file again."
        ) from error


def text_of(mask: Mask) -> str:
    """A mask, bool [frames, rows, columns], as text: its shape, then its bits, packed and compressed.

    Raises:
        LayoutError: another number of axes, or too many cells.
    """
    if mask.ndim != 3 or not 0 < mask.size <= MOST_CELLS:
        raise LayoutError(
            f"A mask must be frames x rows x columns, at most {MOST_CELLS:,} cells. Got {mask.shape}. Resize it."
        )
    shape = "x".join(map(str, mask.shape))
    return f"{shape}:{base64.b64encode(zlib.compress(np.packbits(mask).tobytes(), 9)).decode('ascii')}"


def kept(tree: Tree) -> Tree:
    """A recipe whose mask files have been read into their values; values that are there stay.

    Raises:
        RecipeError: a file outside of the recipe's folder, or one that is no mask.
    """
    masks = tree.get("masks")
    if masks is None or not isinstance(masks.value, dict):
        return tree
    filled = Tree({name: _filled(mask) for name, mask in masks.value.items()}, masks.origin, masks.line)
    return Tree({**tree.value, "masks": filled}, tree.origin, tree.line)


def _filled(mask: Tree) -> Tree:
    file, values = mask.get("file"), mask.get("values")
    if file is None or values is not None or not isinstance(file.value, str):
        return mask
    path = inside(file.value, file)
    try:
        text = text_of(_read(path))
    except MmditError as error:
        raise file.error(str(error)) from error
    return Tree({**mask.value, "values": Tree(text, file.origin, file.line)}, mask.origin, mask.line)


def _read(path: Path) -> Mask:
    if path.suffix == ".npz":
        _refuse_bomb(path)
        return maskfile.load(path)
    if path.suffix != ".png":
        raise LayoutError(f"A mask must be an npz or a png file. Got {path.name}. Convert it.")
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            if picture.width * picture.height > MOST_CELLS:
                raise LayoutError(
                    f"A mask must have at most {MOST_CELLS:,} pixels. Got {picture.width} x {picture.height} in "
                    f"{path.name}. Resize it."
                )
            return np.asarray(picture.convert("L"))[None] > 127
    except (OSError, SyntaxError, ValueError) as error:
        raise LayoutError(f"A mask must be a readable png. Got {path.name}: {error}. Write it again.") from error


def _refuse_bomb(path: Path) -> None:
    """Before anything is unpacked; what is no zip at all is left to the reader."""
    try:
        with ZipFile(path) as file:
            size = sum(part.file_size for part in file.infolist())
    except (OSError, BadZipFile):
        return
    if size > 9 * MOST_CELLS:
        raise LayoutError(
            f"A mask must have at most {MOST_CELLS:,} cells. Got {size:,} bytes in {path.name}. Keep the mask alone."
        )


def _unpacked(text: str) -> Mask:
    shape, _, packed = text.partition(":")
    sizes = [int(size) for size in shape.split("x")]
    cells = int(np.prod(sizes, dtype=np.int64))
    if len(sizes) != 3 or min(sizes) < 1 or max(sizes) > MOST_CELLS or not 0 < cells <= MOST_CELLS:
        raise ValueError("no shape of a mask")
    bits = zlib.decompressobj().decompress(base64.b64decode(packed, validate=True), (cells + 7) // 8 + 1)
    if len(bits) != (cells + 7) // 8:
        raise ValueError(f"{len(bits)} bytes for {cells} cells")
    return np.unpackbits(np.frombuffer(bits, np.uint8), count=cells).astype(bool).reshape(sizes)
