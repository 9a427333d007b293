"""The commands that read finished runs: maps, mask, diff. No torch; numpy and the rest inside the commands."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from probe.errors import UsageError
from recipes.commands import console

if TYPE_CHECKING:
    from recipes.compare import Comparison

Format = Annotated[Literal["text", "json"], typer.Option("--format", help="text for people, json for programs")]
Folder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]
Layer = Annotated[int | None, typer.Option(help="Mean over the recorded ones by default.")]
Step = Annotated[int | None, typer.Option(help="Mean over the recorded ones by default.")]
Head = Annotated[int | None, typer.Option(help="Mean over the recorded ones by default.")]
Segment = Annotated[int | None, typer.Option(help="Segment of a longer video.")]
Direction = Annotated[Literal["vt", "tv"], typer.Option(help="vt: video looks at the word; tv: back.")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Where to write it; in the run folder.")]


def maps(
    folder: Folder,
    word: Annotated[str | None, typer.Option(help="A recorded word; without it, what there is.")] = None,
    layer: Layer = None,
    step: Step = None,
    head: Head = None,
    segment: Segment = None,
    direction: Direction = "vt",
    export: Annotated[Literal["npz", "csv", "gif", "mp4", "png"] | None, typer.Option(help="Write a file.")] = None,
    out: Out = None,
    format: Format = "text",
) -> None:
    """Word maps of a run: numbers, or heat over its frames."""
    from probe.store import Run
    from recipes import heatmap

    opened = Run(folder)
    if word is None:
        if export is not None or out is not None:
            raise UsageError(f"An export must name its --word. Got none. Recorded words: {', '.join(opened.words)}.")
        console.facts(str(folder), console.contents(opened), format)
        return
    picked = heatmap.choose(opened, word, layer, step, head, segment, direction)
    if export is None and out is None:
        console.facts(f"{word} in {folder}", heatmap.summary(picked), format)
        return
    console.facts("written", {"file": str(heatmap.export(opened, picked, export, out))}, format)


def mask(
    folder: Folder,
    word: Annotated[str, typer.Option(help="A recorded word.")],
    method: Annotated[Literal["otsu", "threshold", "top"], typer.Option(help="How the map is cut.")] = "otsu",
    value: Annotated[float | None, typer.Option(help="threshold: inside above it; top: share of patches.")] = None,
    smooth: Annotated[float, typer.Option(help="Gaussian blur of each frame first, in patches.")] = 0.0,
    per: Annotated[
        Literal["frame", "clip", "none"],
        typer.Option(help="Bring each frame or the clip to 0 to 1 before the cut; none: cut the lift."),
    ] = "clip",
    largest: Annotated[bool, typer.Option("--largest", help="Keep the largest part, connected in time.")] = False,
    layer: Layer = None,
    step: Step = None,
    head: Head = None,
    segment: Segment = None,
    direction: Direction = "vt",
    against: Annotated[Path | None, typer.Option(help="Another mask: an npz file, or a run, cut alike.")] = None,
    against_word: Annotated[str | None, typer.Option(help="The word there; the same by default.")] = None,
    export: Annotated[Literal["npz", "png", "gif", "mp4"] | None, typer.Option(help="Write a file.")] = None,
    out: Out = None,
    format: Format = "text",
) -> None:
    """Where a word is: its map cut into a mask, measured, compared with another."""
    from probe.store import Run
    from recipes import maskfile
    from recipes.heatmap import choose

    opened, rule = Run(folder), maskfile.Rule(method, value, smooth, per, largest)
    picked = choose(opened, word, layer, step, head, segment, direction)
    found = rule.cut(picked.lift)
    facts = maskfile.summary(found, picked, rule)
    if against is not None and against.suffix == ".npz":
        if against_word is not None:
            raise UsageError(f"--against-word must go with a run. Got the file {against}, one mask. Leave it out.")
        facts |= maskfile.agreement(found, maskfile.load(against), str(against))
    elif against is not None or against_word is not None:
        other = Run(against or folder)
        there = choose(other, against_word or word, layer, step, head, segment, direction)
        facts |= maskfile.agreement(found, rule.cut(there.lift), f"{there.word} in {other.path}")
    if export is not None or out is not None:
        facts["file"] = str(maskfile.export(opened, picked, rule, found, export, out))
    console.facts(f"{word} in {folder}", facts if format == "json" else _shown(facts), format)


def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="A run folder.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another; differences are A - B.")],
    word: Annotated[str | None, typer.Option(help="Only the maps of this word.")] = None,
    metric: Annotated[
        Literal["mass", "heads", "frames", "word"] | None,
        typer.Option(help="Only this; all that both have by default."),
    ] = None,
    mode: Annotated[
        Literal["absolute", "relative", "zscore"],
        typer.Option(help="A - B; over their mean size; or how unusual among all heads."),
    ] = "absolute",
    layer: Annotated[int | None, typer.Option(help="Mean over the shared ones by default.")] = None,
    step: Annotated[int | None, typer.Option(help="Mean over those of the same timestep by default.")] = None,
    segment: Segment = None,
    heads: Annotated[int, typer.Option(min=1, help="How many heads to list.")] = 10,
    export: Annotated[Literal["npz", "csv"] | None, typer.Option(help="Write a file.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Where to write it; in run A by default.")] = None,
    format: Format = "text",
) -> None:
    """What differs between two runs: where they come from, word maps, region masses, heads."""
    from probe.store import Run
    from recipes import compare
    from recipes.pair import pair

    found = compare.compare(pair(Run(a), Run(b), step, layer, segment), word, metric, mode, heads)
    file = compare.export(found, export, out, a / "diff") if export is not None or out is not None else None
    _show(found, {"A": str(a), "B": str(b)} | ({"file": str(file)} if file else {}), format)


def _show(found: Comparison, facts: dict[str, str], format: str) -> None:
    if format == "json":
        console.data({**facts, **found.tables, "left out": found.left_out})
        return
    console.facts("A against B", facts)
    for name, rows in found.tables.items():
        console.table(name, _shown(rows)) if rows else console.text(f"{name}: nothing")
    for line in found.left_out:
        console.text(f"left out: {line}")


def _shown(value: Any) -> Any:
    """A dash for None, for people."""
    if isinstance(value, dict):
        return {name: _shown(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_shown(part) for part in value]
    return "–" if value is None else value
