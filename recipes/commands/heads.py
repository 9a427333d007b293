"""`mmdit heads` and `mmdit search`: heads that stand out in a run, and those at which a recipe works best."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from recipes.commands import console
from recipes.commands.read import Folder, Format, Segment, Step


def heads(
    folder: Folder,
    metric: Annotated[
        list[str] | None,
        typer.Option(help="name or name=weight, as entropy_video=-1; repeat it. Without it, what there is."),
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="How many heads, and as many to compare with.")] = 8,
    control: Annotated[
        Literal["lowest", "random"], typer.Option(help="The heads to compare with: lowest scores, or drawn.")
    ] = "lowest",
    seed: Annotated[int, typer.Option(min=0, help="Of the draw.")] = 0,
    step: Step = None,
    segment: Segment = None,
    format: Format = "text",
) -> None:
    """Heads whose recorded metrics stand out, and a control group of as many."""
    from probe.store import Run
    from recipes import headrank

    opened = Run(folder)
    if not metric:
        console.facts(str(folder), opened.metric_info or {"metrics": "none; record some with record.readouts"}, format)
        return
    found = headrank.ranked(opened, headrank.weights_of(opened, metric), count, control, seed, step, segment or 0)
    if format == "json":
        console.data(found)
        return
    console.table(f"heads of {folder} by {', '.join(found['weights'])}", headrank.rows(found))
    for group in ("candidates", "control"):
        console.text(f"{group}: places: {found[group]}")


def search(
    name: Annotated[str, typer.Argument(help="A search by name, or a file.")],
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds, from --first on.")] = 3,
    first: Annotated[int, typer.Option(min=0, help="The first seed; studies take those from 0 on.")] = 100,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="A JSON file for every score.")] = None,
    format: Format = "text",
) -> None:
    """Find the layers or heads at which a recipe works best (HeadHunter)."""
    import json

    from recipes import hunt
    from recipes.studio import Studio

    plan = hunt.load(name)
    studio = Studio(plan.recipe)
    found = hunt.search(plan, range(first, first + seeds), studio, studio.counts)
    if out is not None:
        out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if format == "json":
        console.data(found)
        return
    console.table(f"{name}: {plan.recipe}, {found['empty']:.3f} without", hunt.rows(found))
    console.text(f"{plan.variable}: {found['chosen']}")
