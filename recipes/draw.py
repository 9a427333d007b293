"""Numbers to labelled pictures: matrices with axes and a colour bar, sheets of tiles. numpy and Pillow only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from probe.film import INK, MUTED, PAPER, Frames

Values = NDArray[np.floating]

# matplotlib's maps (CC0) at even steps: readable by colour-blind people, monotone in grey
VIRIDIS = "440154 482878 3e4989 31688e 26828e 1f9e89 35b779 6ece58 b5de2b fde725"
MAGMA = "000004 180f3d 440f76 721f81 9e2f7f cd4071 f1605d fd9668 feca8d fcfdbf"

_MARGIN, _GAP, _LINE = 24, 8, 22
_GRID = 17  # pixels of a cell from which on thin lines part the cells
_BAR, _WIDE, _LEGEND = 360, 18, 110  # pixels of a colour bar, and of all beside the picture
_TITLE, _SMALL = ImageFont.load_default(20), ImageFont.load_default(13)


@dataclass(frozen=True)
class Scale:
    """Which values have the first and the last colour; `log` spaces colours by the logarithm."""

    low: float
    high: float
    log: bool = False

    def place(self, values: Values) -> Values:
        """Values as places between the colours, 0 to 1; those outside have the first or the last."""
        low, high = self._bounds()
        if self.log:
            values, low, high = (np.log(np.maximum(one, low)) for one in (values, low, high))
        return np.clip((np.asarray(values, float) - low) / ((high - low) or 1), 0, 1)

    def value(self, place: float) -> float:
        """The value at a place."""
        low, high = self._bounds()
        return low * (high / low) ** place if self.log else low + (high - low) * place

    def _bounds(self) -> tuple[float, float]:
        """A logarithm ends four decades below the highest value."""
        high = self.high or 1e-30
        return (max(self.low, high / 1e4), high) if self.log else (self.low, self.high)


@dataclass(frozen=True)
class Axis:
    """One side of a matrix: what its cells are, labels by the cell they stand at, and after how many cells a mark
    stands (0: none).
    """

    name: str
    labels: Mapping[int, str]
    marks: int = 0


@dataclass(frozen=True)
class Legend:
    """The colours of a picture: which values have them, their unit, VIRIDIS or MAGMA, and words for the two ends in
    place of numbers.
    """

    scale: Scale
    unit: str
    colours: str = VIRIDIS
    ends: tuple[str, str] | None = None

    def paint(self, values: Values) -> Frames:
        """Colours [..., 3] of values."""
        return coloured(self.scale.place(values), self.colours)


def coloured(places: Values, colours: str) -> Frames:
    """Colours [..., 3] of places from 0, the first colour, to 1, the last."""
    table = np.array([[int(one[i : i + 2], 16) for i in (0, 2, 4)] for one in colours.split()], float)
    at = np.clip(places, 0, 1) * (len(table) - 1)
    low = np.minimum(at.astype(int), len(table) - 2)
    share = (at - low)[..., None]
    return (table[low] * (1 - share) + table[low + 1] * share).round().astype(np.uint8)


def matrix(title: str, notes: Sequence[str], values: Values, sides: tuple[Axis, Axis], legend: Legend) -> Image.Image:
    """A matrix [R, C], rows downwards; `sides` are its rows and columns, `notes` stand muted below the title."""
    rows, columns = sides
    cell = _cell(values.shape, sides)
    picture = legend.paint(values).repeat(cell, 0).repeat(cell, 1)
    if cell >= _GRID:
        picture[cell - 1 :: cell] = picture[:, cell - 1 :: cell] = PAPER
    height, width = picture.shape[:2]
    left = _MARGIN + _LINE + _widest(rows) + 2 * _GAP
    above = _LINE + 2 * _GAP + (_LINE if _lies(columns, cell) else _widest(columns))
    sheet, top = _sheet(title, notes, (left + width + _LEGEND, above + height))
    corner = left, top + above
    sheet.paste(Image.fromarray(picture), corner)
    _beside(sheet, rows, corner, cell, height)
    _above(sheet, columns, corner, cell, width)
    ImageDraw.Draw(sheet).text((left + width // 2, top), columns.name, MUTED, _SMALL, "ma")
    _bar(sheet, (left + width + 2 * _GAP, corner[1]), min(height, _BAR), legend)
    return sheet


def tiles(
    title: str,
    notes: Sequence[str],
    rows: Mapping[str, Sequence[Frames]],
    columns: Sequence[str],
    legend: Legend,
) -> Image.Image:
    """Rows of pictures of one size [H, W, 3], by their label, with a label above each column."""
    height, width = next(iter(rows.values()))[0].shape[:2]
    left = _MARGIN + max(map(_length, rows)) + _GAP
    size = left + len(columns) * (width + _GAP) + _LEGEND, _LINE + len(rows) * (height + _GAP)
    sheet, top = _sheet(title, notes, size)
    draw, first = ImageDraw.Draw(sheet), top + _LINE
    for number, label in enumerate(columns):
        draw.text((left + number * (width + _GAP) + width // 2, first - 6), label, MUTED, _SMALL, "ms")
    for line, (label, pictures) in enumerate(rows.items()):
        down = first + line * (height + _GAP)
        draw.text((left - _GAP, down + height // 2), label, INK, _SMALL, "rm")
        for number, picture in enumerate(pictures):
            sheet.paste(Image.fromarray(picture), (left + number * (width + _GAP), down))
    total = len(rows) * (height + _GAP) - _GAP
    _bar(sheet, (left + len(columns) * (width + _GAP) + _GAP, first), min(total, _BAR), legend)
    return sheet


def _cell(shape: tuple[int, ...], sides: tuple[Axis, Axis]) -> int:
    """Pixels of a cell: as many as fit into 900, no more than 72 unless there are few, and enough for its label where
    every cell has one.
    """
    whole = all(len(side.labels) == size for side, size in zip(sides, shape, strict=True))
    return int(np.clip(900 // max(shape), _GRID if whole else 1, max(72, 240 // max(shape))))


def _beside(sheet: Image.Image, rows: Axis, corner: tuple[int, int], cell: int, height: int) -> None:
    """Name, labels and marks of the rows, left of the picture whose upper left corner is given."""
    (left, top), draw = corner, ImageDraw.Draw(sheet)
    _upright(sheet, (_MARGIN, top + (height + _length(rows.name)) // 2), rows.name, MUTED)
    for at, label in rows.labels.items():
        draw.text((left - _GAP, top + (at + 0.5) * cell), label, INK, _SMALL, "rm")
    for at in range(0, height + 1, rows.marks * cell) if rows.marks else ():
        draw.line((left - 5, top + at, left - 1, top + at), MUTED)


def _above(sheet: Image.Image, columns: Axis, corner: tuple[int, int], cell: int, width: int) -> None:
    """Labels and marks of the columns; labels stand upright where they are wider than their cells."""
    (left, top), draw = corner, ImageDraw.Draw(sheet)
    for at, label in columns.labels.items():
        if _lies(columns, cell):
            draw.text((left + (at + 0.5) * cell, top - _GAP), label, INK, _SMALL, "ms")
        else:
            _upright(sheet, (left + round((at + 0.5) * cell) - 8, top - _GAP), label, INK)
    for at in range(0, width + 1, columns.marks * cell) if columns.marks else ():
        draw.line((left + at, top - 5, left + at, top - 1), MUTED)


def _sheet(title: str, notes: Sequence[str], size: tuple[int, int]) -> tuple[Image.Image, int]:
    """Paper with its title and notes, as wide as the title and `size` ask, and where the picture begins."""
    width = max(size[0], _length(title, _TITLE) + _MARGIN, 460) + _MARGIN
    lines = [line for note in notes for line in _wrapped(note, width - 2 * _MARGIN)]
    top = _MARGIN + 32 + 19 * len(lines) + _GAP
    sheet = Image.new("RGB", (width, top + size[1] + _MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, _MARGIN), title, INK, _TITLE)
    for number, line in enumerate(lines):
        draw.text((_MARGIN, _MARGIN + 30 + 19 * number), line, MUTED, _SMALL)
    return sheet, top


def _bar(sheet: Image.Image, place: tuple[int, int], height: int, legend: Legend) -> None:
    """The colours from the last, on top, to the first, with five values beside them."""
    (left, top), draw = place, ImageDraw.Draw(sheet)
    ramp = coloured(np.linspace(1, 0, height), legend.colours)[:, None].repeat(_WIDE, 1)
    sheet.paste(Image.fromarray(ramp), (left, top))
    for number in range(5):
        text = f"{legend.scale.value(number / 4):.3g}"
        if legend.ends is not None:
            text = {0: legend.ends[0], 4: legend.ends[1]}.get(number, "")
        anchor = "ld" if number == 0 else "la" if number == 4 else "lm"
        draw.text((left + _WIDE + 6, top + round(height * (1 - number / 4))), text, INK, _SMALL, anchor)
    _upright(sheet, (left + _WIDE + 56, top + min(height, _length(legend.unit))), legend.unit, MUTED)


def _upright(sheet: Image.Image, place: tuple[int, int], text: str, colour: tuple[int, int, int]) -> None:
    """Text that is read upwards, from `place`, its lower left corner."""
    strip = Image.new("RGB", (_length(text) + 2, 18), PAPER)
    ImageDraw.Draw(strip).text((0, 1), text, colour, _SMALL)
    turned = strip.rotate(90, expand=True)
    sheet.paste(turned, (place[0], place[1] - turned.height))


def _wrapped(text: str, width: int) -> list[str]:
    """Lines that are no wider than `width` pixels, broken between words."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], longer] if _length(longer) <= width or not lines[-1] else [*lines, word]
    return lines


def _length(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont = _SMALL) -> int:
    return round(font.getlength(text))


def _widest(side: Axis) -> int:
    return max(map(_length, side.labels.values()), default=0)


def _lies(side: Axis, cell: int) -> bool:
    """Whether there is room for the labels side by side."""
    places = sorted(side.labels)
    distance = min((after - before for before, after in pairwise(places)), default=len(places) + 1)
    return _widest(side) < cell * distance
