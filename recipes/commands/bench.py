"""`mmdit bench`: what looking, rewriting and stories cost, in ratios to doing nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from recipes.commands import console
from recipes.commands.read import Format

if TYPE_CHECKING:
    from recipes.benches.timing import Method

app = typer.Typer(help="Timings side by side: attention, rewrite, record, ditctrl.", no_args_is_help=True)

Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1; CUDA if there is one by default.")]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option("--dtype", help="float32 on the CPU, bfloat16 on a GPU by default."),
]
Threads = Annotated[
    int, typer.Option("--threads", min=1, help="On the CPU: waiting threads count as busy, so one is most exact.")
]
Rounds = Annotated[int, typer.Option("--rounds", min=1, help="Rounds that count; all methods take turns in each.")]


@app.command()
def attention(
    size: Annotated[str, typer.Option(help="tiny, mini, small, medium, cogvideox-2b, .. or hunyuan.")] = "medium",
    device: Device = None,
    dtype: Dtype = None,
    rounds: Rounds = 3,
    threads: Threads = 1,
    format: Format = "text",
) -> None:
    """One attention call: each readout beside plain attention."""
    from probe.models.place import place_of
    from recipes.benches.attention import Bench, shape_of

    shape = shape_of(size)
    place, kind = place_of(device, dtype)
    _print(f"{size}: {shape}", Bench(shape, place, kind).methods(), place, kind, rounds, threads, format)


@app.command()
def record(
    size: Annotated[str, typer.Option(help="miniature, or a size of bench attention with random weights.")] = "small",
    device: Device = None,
    dtype: Dtype = None,
    rounds: Rounds = 3,
    threads: Threads = 1,
    format: Format = "text",
) -> None:
    """A whole forward: recording beside plain generation."""
    from recipes.quiet import quiet_libraries

    quiet_libraries()
    from probe.models.place import place_of
    from recipes.benches.record import methods

    place, kind = place_of(device, dtype)
    title, made = methods(size, place, kind)
    _print(title, made, place, kind, rounds, threads, format)


@app.command()
def rewrite(
    size: Annotated[str, typer.Option(help="tiny, mini, small, medium, cogvideox-2b, .. or hunyuan.")] = "medium",
    device: Device = None,
    dtype: Dtype = None,
    rounds: Rounds = 3,
    threads: Threads = 1,
    format: Format = "text",
) -> None:
    """Two calls that take from each other: each rewriting beside plain attention and beside its usual form."""
    from probe.models.place import place_of
    from recipes.benches.attention import shape_of
    from recipes.benches.rewrite import Bench

    shape = shape_of(size)
    place, kind = place_of(device, dtype)
    _print(f"{size}: 2 x {shape}", Bench(shape, place, kind).methods(), place, kind, rounds, threads, format)


@app.command()
def ditctrl(
    size: Annotated[str, typer.Option(help="tiny, mini, small, cogvideox-2b or -5b, with random weights.")] = "mini",
    layers: Annotated[int, typer.Option(min=2, help="Layers of the model; CogVideoX-2B has 30.")] = 6,
    prompts: Annotated[int, typer.Option(min=2, max=10, help="Stories of 2, 3, 5 and 10 prompts, up to this.")] = 3,
    segments_per_batch: Annotated[int | None, typer.Option(min=1, help="Segments in one forward; all.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    rounds: Rounds = 1,
    threads: Threads = 1,
    format: Format = "text",
) -> None:
    """A story beside clips of its prompts and beside the authors' schedule: layer passes, time, memory."""
    from recipes.quiet import quiet_libraries

    quiet_libraries()
    from ditctrl.sharing import Chunks
    from probe.models.place import place_of
    from recipes.benches import timing
    from recipes.benches.attention import shape_of
    from recipes.benches.ditctrl import Bench, cases

    shape, (place, kind) = shape_of(size), place_of(device, dtype)
    bench = Bench(shape, layers, place, kind, Chunks(segments_per_batch))
    with timing.threads(threads):
        found = [row for case in cases(shape.grid.frames, layers, prompts) for row in bench.measured(case, rounds)]
        header = timing.header(place, kind)
    if format == "json":
        console.data({"size": f"{size}: {layers} layers, {shape}", "on": header, "ways": found})
        return
    note = "A run of 50 steps. pairs: the authors' schedule; +mask: mask-guided. extra MB: of the largest step."
    console.table(f"{size}: {layers} layers, {shape}\n{header}\n{note}", [_way(row) for row in found])


def _way(row: dict[str, Any]) -> dict[str, str]:
    """One line of the table."""
    difference = row["difference"]
    return {
        "prompts": str(row["prompts"]),
        "frames": str(row["latent frames"]),
        "way": row["way"],
        "passes": f"{row['passes']:.0f}",
        "/ pairs": f"{row['passes / pairs']:.2f}",
        "time / pairs": f"{row['time / pairs']:.2f}",
        "time / clips": f"{row['time / clips']:.2f}",
        "ms / frame": f"{1e3 * row['seconds a latent frame']:.0f}",
        "extra MB": f"{row['extra bytes'] / 1e6:.0f}",
        "difference": "" if difference is None else f"{difference:.0e}",
    }


def _print(title: str, methods: list[Method], device: str, dtype: Any, rounds: int, threads: int, format: str) -> None:
    from recipes.benches import timing

    with timing.threads(threads):
        timed, header = timing.measure(methods, device, rounds), timing.header(device, dtype)
    plain = timed[0].seconds
    if format == "json":
        console.data({"size": title, "on": header, "methods": [one.facts(plain) for one in timed]})
        return
    note = "x plain: 1 is the plain one; + is time on top of it. error: against float64 (record: against plain)."
    console.table(f"{title}\n{header}\n{note}", [one.row(plain) for one in timed])
