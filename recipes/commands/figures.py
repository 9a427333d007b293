"""`mmdit figures`: the attention maps of a run as pictures and arrays. No torch; numpy inside the command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from probe.errors import UsageError
from recipes.commands import console
from recipes.commands.read import Folder, Format, Head, Segment, Step


def figures(
    folder: Folder,
    what: Annotated[
        str | None, typer.Option(help="Some of tokens,text,spatial,temporal; all that were recorded by default.")
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(help="3,5: two figures; 0-3: the mean of four layers; cumulative: means from layer 0 on."),
    ] = None,
    step: Step = None,
    head: Head = None,
    segment: Segment = None,
    frame: Annotated[int | None, typer.Option(help="Token frame of the word maps, and of the spatial map.")] = None,
    patch: Annotated[str | None, typer.Option(help="Y,X of the temporal map; the middle by default.")] = None,
    scale: Annotated[
        Literal["minmax", "fixed", "log"],
        typer.Option(
            help="minmax: each picture by itself; fixed: from 0, one for all; log: one for all, by logarithm."
        ),
    ] = "minmax",
    padding: Annotated[bool, typer.Option("--padding", help="Show the padding of the text too.")] = False,
    authors: Annotated[
        bool, typer.Option("--authors", help="Steps, layers, frame, words and scale as in DiTCtrl's figures.")
    ] = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="A folder; figures in the run by default.")] = None,
    format: Format = "text",
) -> None:
    """Attention maps of a run as labelled pictures, and as arrays."""
    from probe.store import Run
    from recipes import figures as made
    from recipes.figure import Choice

    opened, target = Run(folder), out or folder / "figures"
    if authors and not (layers is step is frame is None):
        raise UsageError("--authors must choose layers, step and frame itself. Got one of them. Leave it out.")
    spans = (None,) if layers is None else made.layers_of(layers, opened.layers)
    choice = Choice(_kinds(what), spans, step, head, segment, frame, frame, _patch(patch), None, scale, padding)
    choice = made.as_the_authors(opened, choice) if authors else choice
    drawn = made.figures(opened, choice)
    console.table(f"in {target}, each as .png and .npy", made.write(drawn, target), format)
    left = [what for what in made.recorded_kinds(opened, choice) if what not in {one.what for one in drawn}]
    if left and what is None and format == "text":
        console.text(f"left out: {', '.join(left)}, recorded in other steps or frames only")


def _kinds(text: str | None) -> tuple[str, ...] | None:
    if text is None:
        return None
    from recipes.figures import KINDS

    found = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    if not set(found) <= set(KINDS):
        raise UsageError(f"--what must be some of {','.join(KINDS)}. Got {text!r}. Separate them by commas.")
    return found


def _patch(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    try:
        row, column = (int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(
            f"--patch must be a row and a column. Got {text!r}. Write 15,22, each counted from 0."
        ) from None
    return row, column
