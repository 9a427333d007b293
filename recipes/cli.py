"""The command line, `mmdit`. Heavy libraries are imported inside commands, so that --help answers at once."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from probe.errors import MmditError, UsageError
from recipes import say

app = typer.Typer(
    name="mmdit",
    help="Look into, and edit, the attention of video diffusion transformers. --debug shows tracebacks.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
recipes_app = typer.Typer(help="The recipes: list, show, validate, schema.", no_args_is_help=True)
app.add_typer(recipes_app, name="recipes")

Format = Annotated[Literal["text", "json"], typer.Option("--format", help="text for people, json for programs")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Run folder; runs/<date>-<name> by default.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an earlier run in that folder.")]
Model = Annotated[str | None, typer.Option("--model", "-m", help="miniature, a pipeline folder or a hub id.")]
Sets = Annotated[list[str] | None, typer.Option("--set", help="key=value, for example steps=50 or sampler.seed=7.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print sizes and predicted cost, and stop.")]


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="A built-in name or a YAML file.")],
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="Replaces the prompts; repeat it.")] = None,
    model: Model = None,
    sets: Sets = None,
    out: Out = None,
    dry_run: DryRun = False,
    force: Force = False,
    format: Format = "text",
) -> None:
    """Run a recipe: generate the video, keep its attention."""
    values: dict[str, Any] = {"prompts": prompt} if prompt else {}
    _run(recipe, sets, values | ({"model": model} if model else {}), out, dry_run, force, format)


@app.command()
def record(
    prompt: Annotated[str, typer.Argument(help="What to generate.")],
    words: Annotated[str, typer.Option(help="Words to map, with commas between; every word by default.")] = "",
    model: Model = None,
    sets: Sets = None,
    out: Out = None,
    dry_run: DryRun = False,
    force: Force = False,
    format: Format = "text",
) -> None:
    """Generate one prompt and keep its word maps and region masses."""
    chosen = [word.strip() for word in words.split(",") if word.strip()]
    values: dict[str, Any] = {"prompts": [prompt]} | ({"model": model} if model else {})
    sets = [*(sets or []), *([f"record.words={say.as_yaml_list(chosen)}"] if chosen else [])]
    _run("record", sets, values, out, dry_run, force, format)


def _run(
    name: str, sets: list[str] | None, values: dict[str, Any], out: Path | None, dry: bool, force: bool, format: str
) -> None:
    from recipes import parse

    recipe = parse.load(name, sets or (), values)
    _quiet_libraries()
    from recipes.job import prepare
    from recipes.run import default_folder, execute

    if dry:
        from recipes.catalogue import predicted

        say.facts(f"{recipe.name}: nothing was run", predicted(prepare(recipe)), format)
        return
    folder = out or default_folder(recipe)
    _watch(folder, lambda: execute(recipe, folder, force, quiet=format == "json"), format)


def _watch(folder: Path, work: Callable[[], Any], format: str) -> None:
    try:
        done = work()
    except KeyboardInterrupt:
        raise MmditError(say.interrupted(folder)) from None
    say.facts("done", say.outcome(done), format)


@app.command()
def resume(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run that was interrupted or failed.")],
    format: Format = "text",
) -> None:
    """Go on with a stopped run; the video equals an undisturbed run's."""
    _quiet_libraries()
    from recipes.run import go_on

    _watch(folder, lambda: go_on(folder, quiet=format == "json"), format)


@recipes_app.command("list")
def list_recipes(format: Format = "text") -> None:
    """The built-in recipes."""
    from recipes import parse

    rows = [{"name": name, "description": parse.load(name).description} for name in parse.names()]
    say.table("recipes", rows, format)


@recipes_app.command()
def show(recipe: str) -> None:
    """Print a recipe's YAML, a starting point for your own."""
    from recipes import parse

    say.text(parse.find(recipe).read_text(encoding="utf-8").rstrip())


@recipes_app.command()
def validate(recipe: Annotated[str, typer.Argument(help="A built-in name or a YAML file.")], sets: Sets = None) -> None:
    """Check a recipe without loading a model."""
    from recipes import parse

    say.text(f"{recipe} is a valid recipe: {parse.load(recipe, sets or ()).name}.")


@recipes_app.command()
def schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    from recipes.recipe import Recipe

    say.data(Recipe.model_json_schema())


@app.command()
def maps(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    word: Annotated[str | None, typer.Option(help="A recorded word; without it, what there is.")] = None,
    layer: Annotated[int | None, typer.Option(help="Mean over the recorded ones by default.")] = None,
    step: Annotated[int | None, typer.Option(help="Mean over the recorded ones by default.")] = None,
    head: Annotated[int | None, typer.Option(help="Mean over the recorded ones by default.")] = None,
    segment: Annotated[int | None, typer.Option(help="Segment of a longer video.")] = None,
    direction: Annotated[Literal["vt", "tv"], typer.Option(help="vt: video looks at the word; tv: back.")] = "vt",
    export: Annotated[Literal["npz", "csv", "gif", "mp4", "png"] | None, typer.Option(help="Write a file.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Where to write it; in the run folder.")] = None,
    format: Format = "text",
) -> None:
    """Word maps of a run: numbers, or heat over its frames."""
    from probe.store import Run
    from recipes import maps as word_maps

    opened = Run(folder)
    if word is None:
        if export is not None:
            raise UsageError(f"--export must come with --word. Got none. Recorded words: {', '.join(opened.words)}.")
        say.facts(str(folder), say.contents(opened), format)
        return
    picked = word_maps.choose(opened, word, layer, step, head, segment, direction)
    if export is None:
        say.facts(f"{word} in {folder}", word_maps.summary(picked), format)
        return
    say.facts("written", {"file": str(word_maps.export(opened, picked, export, out))}, format)


@app.command()
def check(
    model: Annotated[str, typer.Argument(help="miniature, a pipeline folder or a hub id.")] = "miniature",
    format: Format = "text",
) -> None:
    """Prove that this model's attention is read and rewritten exactly; exit 1 if not."""
    _quiet_libraries()
    from probe.models.load import load
    from probe.models.prove import prove

    findings = prove(load(model))
    say.table(f"check {model}", [vars(finding) for finding in findings], format)
    if not all(finding.passed for finding in findings):
        raise MmditError(next(f.sentence for f in findings if not f.passed))


@app.command()
def doctor(format: Format = "text") -> None:
    """Versions, devices and what works here."""
    from recipes.doctor import examine

    say.facts("doctor", examine(), format)


def _quiet_libraries() -> None:
    """No loading bars or hints from the model libraries: a run has its own. Before they are imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def main(arguments: list[str] | None = None) -> None:
    """Entry point: one sentence and an exit code of 1 or 2 for anything that goes wrong, a traceback only with
    --debug.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    try:
        app([a for a in given if a != "--debug"])
    except MmditError as error:
        if debug:
            raise
        say.error(str(error))
        sys.exit(error.exit_code)
    except Exception as error:
        if debug:
            raise
        say.error(
            f"Something unexpected went wrong. Got {type(error).__name__}: {error}. Run again with --debug to see "
            "where."
        )
        sys.exit(1)


if __name__ == "__main__":
    main()
