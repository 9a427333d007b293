"""What a sweep found, one row per run: results.csv and results.json in its folder, whole after every run. No torch."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from probe.errors import StoreError
from probe.folder import save_file
from recipes.sweep import Task

JSON, CSV = "results.json", "results.csv"


@dataclass(frozen=True)
class Row:
    """One run and what was measured; `seconds` is what the run took, `run` its folder in that of the sweep."""

    arm: str
    group: str
    kind: str
    seed: int
    status: Literal["done", "failed"]
    run: str
    features: str | None = None
    seconds: float | None = None
    error: str = ""
    metrics: dict[str, float] = field(default_factory=dict)

    @classmethod
    def done(cls, task: Task, seconds: float | None, metrics: Mapping[str, float]) -> Row:
        """A run that is finished."""
        where = str(task.folder.relative_to(task.out))
        return cls(*task.key[:2], task.kind, task.seed, "done", where, task.features, seconds, "", dict(metrics))

    @classmethod
    def failed(cls, task: Task, error: str) -> Row:
        """A run that is not, and why in one sentence."""
        where = str(task.folder.relative_to(task.out))
        return cls(*task.key[:2], task.kind, task.seed, "failed", where, task.features, None, " ".join(error.split()))

    @property
    def key(self) -> tuple[str, str, int]:
        """What tells it apart from the others."""
        return self.arm, self.group, self.seed


class Table:
    """The rows in the folder of a sweep.

    Raises:
        StoreError: results.json is there and cannot be read.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.rows: dict[tuple[str, str, int], Row] = {row.key: row for row in _read(out / JSON)}

    def add(self, row: Row) -> None:
        """Keep a row, in place of an earlier one of the same run.

        Raises:
            StoreError: the disk refused.
        """
        self.rows[row.key] = row
        self.write()

    def write(self, summary: Sequence[Mapping[str, Any]] | None = None) -> None:
        """Both files; `summary` where the sweep is finished.

        Raises:
            StoreError: the disk refused.
        """
        rows = [self.rows[key] for key in sorted(self.rows)]
        said = json.dumps({"rows": [asdict(row) for row in rows], "summary": summary}, indent=1, ensure_ascii=False)
        save_file(self.out / JSON, f"{said}\n".encode())
        save_file(self.out / CSV, _csv(rows).encode())

    def has(self, task: Task) -> bool:
        """Whether a run was made and measured as the task asks."""
        row = self.rows.get(task.key)
        return row is not None and row.status == "done" and row.features == task.features and task.folder.is_dir()


def _read(path: Path) -> list[Row]:
    try:
        return [Row(**row) for row in json.loads(path.read_text(encoding="utf-8"))["rows"]]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"{path.name} of a sweep must be as it was written. Got a damaged {path}: {error}. Remove it; runs that "
            "are finished are then only measured again."
        ) from error


def _csv(rows: Sequence[Row]) -> str:
    """One line per run, a column per metric."""
    metrics = dict.fromkeys(name for row in rows for name in row.metrics)
    plain = [{name: value for name, value in asdict(row).items() if name != "metrics"} for row in rows]
    columns = [*(name for name in Row.__dataclass_fields__ if name != "metrics"), *metrics]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({**facts, **row.metrics} for facts, row in zip(plain, rows, strict=True))
    return text.getvalue()
