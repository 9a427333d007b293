"""What the command line prints: data to stdout, everything else to stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from probe.store import Run


def facts(title: str, values: Mapping[str, Any], format: str = "text") -> None:
    """Names and values, one per line; None is left out."""
    if format == "json":
        data(dict(values))
        return
    grid = Table.grid(padding=(0, 2))
    for name, value in values.items():
        if value is not None:
            grid.add_row(f"[dim]{escape(name)}[/dim]", escape(_short(value)))
    console = _console()
    console.print(f"[bold]{escape(title)}[/bold]")
    console.print(grid)


def table(title: str, rows: Sequence[Mapping[str, Any]], format: str = "text") -> None:
    """Rows with the same keys."""
    if format == "json":
        data([dict(row) for row in rows])
        return
    drawn = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for name in rows[0] if rows else ():
        drawn.add_column(name, overflow="fold")
    for row in rows:
        drawn.add_row(*(escape(_short(value)) for value in row.values()))
    _console().print(drawn)


def entries(rows: Sequence[Mapping[str, Any]], format: str = "text") -> None:
    """Rows with a name and a description on a line, and their other texts and lists on the next."""
    if format == "json":
        data([dict(row) for row in rows])
        return
    console = _console()
    for row in rows:
        told = {name: value for name, value in row.items() if name not in ("name", "description") and value}
        rest = [f"{name} {_short(value)}" if isinstance(value, list) else value for name, value in told.items()]
        console.print(f"[bold]{escape(row['name'])}[/bold]  {escape(row['description'])}")
        console.print(f"    [dim]{escape('; '.join(rest))}[/dim]")


def text(line: str) -> None:
    """Plain text."""
    sys.stdout.write(line + "\n")


def data(value: Any) -> None:
    """JSON."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def error(sentence: str) -> None:
    """One sentence on stderr."""
    sys.stderr.write(f"mmdit: {' '.join(sentence.split())}\n")


def outcome(run: Run) -> dict[str, Any]:
    """Where everything of a finished run lies."""
    info = run.info
    return {
        "run": str(run.path),
        "video": str(run.video) if run.video else None,
        "contact sheet": str(run.path / "contact.png"),
        "steps": f"{len(run.steps)} files in {run.path / 'steps'}",
        "words": list(run.words) or None,
        "reconstruction": _decibels(info.get("reconstruction")),
        "layer passes": _passes(info),
        "seconds": info.get("seconds"),
        "next": f"mmdit maps {run.path}" if run.words else None,
    }


def _passes(info: Mapping[str, Any]) -> str | None:
    """What a story took beside DiTCtrl's own schedule."""
    made, reference = info.get("layer_passes"), info.get("pair_loop_passes")
    return f"{made}, {made / reference:.2f} of the pair loop's" if made and reference else None


def _decibels(near: Mapping[str, float] | None) -> str | None:
    """How near a given video comes back."""
    return None if near is None else "autoencoder {autoencoder:.1f} dB, inversion {inversion:.1f} dB".format(**near)


def contents(run: Run) -> dict[str, Any]:
    """What can be read from a run."""
    return {
        "status": run.status,
        "prompts": run.info.get("prompts"),
        "words": list(run.words),
        "steps": list(run.steps),
        "layers": list(run.layers),
        "segments": [f"{segment} {role}" for segment, role in run.segments],
        "video": str(run.video) if run.video else None,
    }


def as_yaml_list(words: Sequence[str]) -> str:
    """Words as a YAML flow list."""
    return json.dumps(list(words), ensure_ascii=False)


def _short(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        whole = all(isinstance(v, int) for v in value) and len(value) > 4
        return f"{value[0]} to {value[-1]} ({len(value)})" if whole else ", ".join(str(v) for v in value)
    return str(value)


def _console() -> Console:
    return Console(file=sys.stdout, highlight=False, soft_wrap=True)
