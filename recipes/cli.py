"""The command line, `mmdit`. Heavy libraries are imported inside commands, so that --help answers at once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from probe.errors import MmditError
from recipes.commands import console, evaluate, figures, heads, read, sweep
from recipes.commands.bench import app as bench_app
from recipes.commands.library import Sets
from recipes.commands.library import app as recipes_app
from recipes.commands.read import Format
from recipes.commands.studies import app as study_app
from recipes.quiet import quiet_libraries

if TYPE_CHECKING:
    from recipes.language.recipe import Recipe

app = typer.Typer(
    name="mmdit",
    help="Look into, and edit, the attention of video diffusion transformers. --debug shows tracebacks.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(recipes_app, name="recipes")
app.add_typer(bench_app, name="bench")
app.add_typer(study_app, name="study")

Out = Annotated[Path | None, typer.Option("--out", "-o", help="Run folder; runs/<date>-<name> by default.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an earlier run in that folder.")]
Model = Annotated[str | None, typer.Option("--model", "-m", help="miniature, a pipeline folder or a hub id.")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1; CUDA if there is one by default.")]
Offload = Annotated[bool, typer.Option("--offload", help="Keep idle parts of the model on the CPU.")]
PerBatch = Annotated[
    int | None,
    typer.Option(
        "--segments-per-batch", min=1, help="Segments of a story in one forward, all by default: less memory."
    ),
]
Neighbours = Annotated[
    str,
    typer.Option(help="What a batch takes from the last segment before it: keep, offload (to the CPU) or recompute."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print sizes and predicted cost, and stop.")]


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="A built-in name, a YAML file, a run folder, or a video of a run.")],
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="Replaces the prompts; repeat it.")] = None,
    model: Model = None,
    sets: Sets = None,
    out: Out = None,
    device: Device = None,
    offload: Offload = False,
    segments_per_batch: PerBatch = None,
    neighbours: Neighbours = "keep",
    dry_run: DryRun = False,
    force: Force = False,
    format: Format = "text",
) -> None:
    """Run a recipe: generate the video, keep its attention."""
    values: dict[str, Any] = {"prompts": prompt} if prompt else {}
    made, computed = _recipe(recipe, sets, values, model), (device, offload, segments_per_batch, neighbours)
    _generate(made, out, force, dry_run, computed, format)


@app.command()
def record(
    prompt: Annotated[str, typer.Argument(help="What to generate.")],
    words: Annotated[str, typer.Option(help="Words to map, with commas between; every word by default.")] = "",
    model: Model = None,
    sets: Sets = None,
    out: Out = None,
    device: Device = None,
    offload: Offload = False,
    dry_run: DryRun = False,
    force: Force = False,
    format: Format = "text",
) -> None:
    """Generate one prompt and keep its word maps and region masses."""
    chosen = [word.strip() for word in words.split(",") if word.strip()]
    sets = [*(sets or []), *([f"record.words={console.as_yaml_list(chosen)}"] if chosen else [])]
    made = _recipe("record", sets, {"prompts": [prompt]}, model)
    _generate(made, out, force, dry_run, (device, offload), format)


def _recipe(name: str, sets: list[str] | None, values: dict[str, Any], model: str | None) -> Recipe:
    from recipes.language import parse

    return parse.load(name, sets or (), values | ({"model": model} if model else {}))


def _generate(recipe: Recipe, out: Path | None, force: bool, dry: bool, computed: tuple[Any, ...], format: str) -> None:
    """Make a run of a recipe, or with `dry` only say what it will be; `computed` is how, as `recipes.run.placed` takes
    it.
    """
    quiet_libraries()
    from recipes.run import default_folder, execute, placed

    where = placed(*computed)
    if dry:
        from recipes.job import prepare
        from recipes.predict import predicted

        console.facts(f"{recipe.name}: nothing was run", predicted(prepare(recipe, where.chunks)), format)
        return
    done = execute(recipe, out or default_folder(recipe), force, format == "json", where)
    console.facts("done", console.outcome(done), format)


@app.command()
def resume(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run that was interrupted or failed.")],
    device: Device = None,
    offload: Offload = False,
    segments_per_batch: PerBatch = None,
    neighbours: Neighbours = "keep",
    format: Format = "text",
) -> None:
    """Go on with a stopped run; the video equals an undisturbed run's."""
    quiet_libraries()
    from recipes.run import go_on, placed

    where = placed(device, offload, segments_per_batch, neighbours)
    console.facts("done", console.outcome(go_on(folder, format == "json", where)), format)


for one in (
    read.maps,
    figures.figures,
    read.mask,
    read.diff,
    heads.heads,
    heads.search,
    evaluate.evaluate,
    sweep.sweep,
):
    app.command()(one)


@app.command()
def check(
    model: Annotated[
        str, typer.Argument(help="miniature, a folder of a pipeline or a transformer, or a hub id.")
    ] = "miniature",
    device: Device = None,
    format: Format = "text",
) -> None:
    """Prove that this model's attention is read and rewritten exactly; exit 1 if not."""
    quiet_libraries()
    from recipes.checkup import examine

    findings = examine(model, device)
    console.table(f"check {model}", [vars(finding) for finding in findings], format)
    if not all(finding.passed for finding in findings):
        raise MmditError(next(f.sentence for f in findings if not f.passed))


@app.command()
def doctor(format: Format = "text") -> None:
    """Versions, devices and what works here."""
    from recipes.doctor import examine

    console.facts("doctor", examine(), format)


INTERRUPTED = 130  # what typer makes of Ctrl-C


def main(arguments: list[str] | None = None) -> None:
    """Entry point: one sentence and an exit code of 1 or 2 for anything that goes wrong, a traceback only with
    --debug.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    try:
        code = app([a for a in given if a != "--debug"], standalone_mode=False)
        if code == INTERRUPTED:
            raise KeyboardInterrupt
        sys.exit(code)
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            raise
        console.error(_sentence(error))
        sys.exit(getattr(error, "exit_code", 1))


def _sentence(error: BaseException) -> str:
    if isinstance(error, MmditError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "Interrupted before anything was written."
    if hasattr(error, "format_message"):  # typer's own usage errors
        return f"{error.format_message()} See mmdit --help."  # type: ignore[attr-defined]
    if isinstance(error, ModuleNotFoundError):
        return f'This command needs more than the base install. Got no {error.name}. Run: pip install ".[model]"'
    return f"Something unexpected went wrong. Got {type(error).__name__}: {error}. Run again with --debug to see where."


if __name__ == "__main__":
    main()
