"""`mmdit evaluate`: what finished videos are worth, in numbers."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from probe.errors import MmditError, StoreError
from recipes.commands import console

if TYPE_CHECKING:
    from recipes.evaluate import Scores
    from recipes.features import Features


def evaluate(
    places: Annotated[list[Path], typer.Argument(metavar="RUN", help="Run folders, folders of them, or video files.")],
    features: Annotated[str, typer.Option(help="miniature, a folder of a CLIP, or its hub id.")] = "miniature",
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="What a video file should show; repeat it.")
    ] = None,
    words: Annotated[
        str | None, typer.Option(help="The object, by recorded words with commas between; record.words by default.")
    ] = None,
    format: Annotated[
        Literal["text", "json", "csv"], typer.Option("--format", help="text for people, json or csv for programs")
    ] = "text",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Also write a .json or .csv file.")] = None,
) -> None:
    """How steady a video is, whether it shows its prompts, and where it turns from one to the next."""
    from recipes.export import write
    from recipes.features import load
    from recipes.quiet import quiet_libraries

    quiet_libraries()
    found = [one for place in places for one in _videos(place)]
    chosen = None if words is None else [word.strip() for word in words.split(",") if word.strip()]
    rows = _rows(found, load(features), prompt or [], chosen)
    if out is not None:
        write({kind: partial(_write, made(rows)) for kind, made in _FORMS.items()}, None, out, out)
    _show(rows, format)
    failed = [row for row in rows if "error" in row]
    if failed:
        raise MmditError(
            f"Every video must be evaluated. Got {len(failed)} of {len(rows)} that could not, the first with: "
            f"{failed[0]['error']}"
        )


def _videos(place: Path) -> list[Path]:
    """A run, a video file, or the runs in a folder."""
    if place.is_file() or (place / "run.json").is_file():
        return [place]
    runs = sorted(file.parent for file in place.rglob("run.json")) if place.is_dir() else []
    if not runs:
        raise StoreError(
            f"A video to evaluate must be a run, a folder of runs, or a file. Got {place}. Check the path."
        )
    return runs


def _rows(
    found: Sequence[Path], features: Features, prompts: Sequence[str], words: Sequence[str] | None
) -> list[dict[str, Any]]:
    """What was measured of each, or its error; the error of one alone is raised."""
    rows = []
    for place in found:
        try:
            told = _judged(place, features, prompts, words)
            rows.append({"run": str(place), **told.numbers, "turns": told.turns})
        except MmditError as error:
            if len(found) == 1:
                raise
            rows.append({"run": str(place), "error": str(error)})
    return rows


def _judged(place: Path, features: Features, prompts: Sequence[str], words: Sequence[str] | None) -> Scores:
    from probe.store import Run
    from recipes import evaluate, footage

    if place.is_dir():
        return evaluate.judge(Run(place), features, words)
    shot = footage.of_file(place, prompts)
    return evaluate.scores(shot.frames, shot.prompts, shot.spans, features, shot.fps)


def _show(rows: Sequence[dict[str, Any]], format: str) -> None:
    if format == "json":
        console.data(rows)
    elif format == "csv":
        console.text(_csv(rows).rstrip())
    else:
        _tables([row for row in rows if "error" not in row])
        for row in rows:
            if "error" in row:
                console.text(f"{row['run']}: {row['error']}")


_COLUMNS = {
    "cscv": "cscv",
    "motion": "motion %",
    "smoothness": "smooth",
    "text": "text",
    "text_margin": "margin",
    "object": "object",
    "background": "background",
}
"""Heads of the columns for people, which have no room for more; programs get every number."""


def _tables(rows: Sequence[dict[str, Any]]) -> None:
    """For people: what is defined in any of the videos, the turns in seconds, and paths from where they part."""
    rows = [{**row, "run": name} for row, name in zip(rows, _names([row["run"] for row in rows]), strict=True)]
    columns = {name: head for name, head in _COLUMNS.items() if any(row[name] is not None for row in rows)}
    shown = [{"run": row["run"], **{head: _short(row[name]) for name, head in columns.items()}} for row in rows]
    if shown:
        console.table("evaluated", shown)
    turns = [
        {
            "run": row["run"],
            "turn": one["turn"],
            "meant at (s)": _short(one["meant_s"]),
            "found at": _short(one["found_s"]),
            "width": _short(one["width_s"]),
            "sharpness": _short(one["sharpness"]),
            "contrast": _short(one["contrast"]),
        }
        for row in rows
        for one in row["turns"]
    ]
    if turns:
        console.table("turns", turns)
    for row in rows:
        if row["still"]:
            console.text(f"{row['run']} hardly moves: its cscv says nothing.")


def _names(paths: Sequence[str]) -> list[str]:
    base = os.path.commonpath([Path(path).parent for path in paths]) if paths else ""
    return [os.path.relpath(path, base) if base else path for path in paths]


def _json(rows: Sequence[dict[str, Any]]) -> str:
    return json.dumps(rows, indent=2, ensure_ascii=False) + "\n"


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    """One line per video, without the single turns."""
    columns = dict.fromkeys(name for row in rows for name in row if name != "turns")
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


_FORMS = {"json": _json, "csv": _csv}


def _write(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8")


def _short(value: Any) -> Any:
    """Three decimals, a dash for None."""
    return "–" if value is None else f"{value:.3f}" if isinstance(value, float) else value
