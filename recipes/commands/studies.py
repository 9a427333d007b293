"""`mmdit study`: whether a recipe does what it says, in numbers, over many seeds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from recipes.commands import console
from recipes.commands.read import Format

app = typer.Typer(help="Measure what recipes do: run, list, show, table.", no_args_is_help=True)
Results = Annotated[
    Path | None, typer.Option("--results", help="Folder of stored results; data/studies of a clone by default.")
]


@app.command()
def run(
    names: Annotated[list[str], typer.Argument(help="Studies by name, or files.")],
    seeds: Annotated[int, typer.Option(min=2, help="How many seeds, from --first on.")] = 20,
    first: Annotated[int, typer.Option(min=0, help="The first seed.")] = 0,
    results: Results = None,
    format: Format = "text",
) -> None:
    """Run studies and store what they find as JSON, one file each."""
    from probe.errors import UsageError
    from recipes import study, study_store
    from recipes.studio import Studio

    plans = {Path(name).stem: study.load(name) for name in names}
    for name, plan in plans.items():
        studio = Studio(plan.recipe)
        arms = study.arms_of(plan, studio.counts)
        texts = [studio.check({**plan.set, **overrides}) for overrides in arms.values()]
        plan.refuse_unknown()
        folder = results or study_store.RESULTS
        done = study_store.Done.at(folder, name, json.dumps([plan.model_dump(), texts]))
        make = _watched(studio, name, len(arms) * seeds, format == "json")
        try:
            found = study.carry_out(plan, range(first, first + seeds), make, arms, done)
        except KeyboardInterrupt:
            raise UsageError(
                f"A study must finish to be stored. Got an interrupt: {done}. Run it again to go on."
            ) from None
        study_store.write(folder, name, found)
        done.forget()
        console.table(f"{name}: {plan.claim}", study.rows({name: found}), format)


@app.command("list")
def list_studies(results: Results = None, format: Format = "text") -> None:
    """The studies, and what they found where their results are stored."""
    from recipes import study, study_store

    found = study_store.stored(results or study_store.RESULTS)
    rows = [
        {
            "study": name,
            "claim": study.load(name).claim,
            "found": study.verdict(found[name]) if name in found else "not run",
        }
        for name in study.names()
    ]
    console.table("studies", rows, format)


@app.command()
def show(name: str, results: Results = None, format: Format = "text") -> None:
    """What one study found."""
    from probe.errors import UsageError
    from recipes import study, study_store

    found = study_store.stored(results or study_store.RESULTS)
    if name not in found:
        raise UsageError(f"A study must have been run. Got {name}. Run: mmdit study run {name}")
    console.table(f"{name}: {found[name]['claim']}", study.rows({name: found[name]}), format)


@app.command()
def table(results: Results = None) -> None:
    """The shipped recipes and what was found, as Markdown."""
    from recipes import study_store
    from recipes.study_table import markdown

    console.text(markdown(results or study_store.RESULTS))


def _watched(make: Any, name: str, count: int, quiet: bool) -> Any:
    """The same maker with a progress bar."""
    from tqdm import tqdm

    bar = tqdm(total=count, desc=name, unit="clip", disable=quiet)

    def made(overrides: Mapping[str, Any], seed: int) -> Any:
        result = make(overrides, seed)
        bar.update()
        return result

    return made
