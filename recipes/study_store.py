"""Where studies keep what they found: results as JSON, and the seeds of one that is not finished. No torch."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from probe.errors import UsageError

RESULTS = Path(__file__).parents[1] / "data" / "studies"
"""What they found on the miniature, in a clone."""


@dataclass
class Done:
    """What a study measured so far: by seed, then by arm, one number per measure. Kept in a file beside the results
    from seed to seed, where one is given, so that an interrupted study goes on; `key` says what was measured.
    """

    file: Path | None = None
    key: str = ""
    values: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    @classmethod
    def at(cls, folder: Path, name: str, key: str) -> Done:
        """What an interrupted study of the same key left in a folder."""
        file = folder / f"{name}.part"
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            kept = json.loads(file.read_text(encoding="utf-8"))
            if kept["key"] == key:
                return cls(file, key, dict(kept["values"]))
        return cls(file, key)

    def __str__(self) -> str:
        return f"{len(self.values)} seeds are kept in {self.file}"

    def add(self, seed: int, found: dict[str, list[float]]) -> None:
        """Keep what one seed gave."""
        self.values[str(seed)] = found
        if self.file is not None:
            _write(self.file, {"key": self.key, "values": self.values})

    def forget(self) -> None:
        """Leave no file behind."""
        if self.file is not None:
            self.file.unlink(missing_ok=True)


def write(folder: Path, name: str, result: Mapping[str, Any]) -> Path:
    """Store a result as folder/name.json."""
    path = folder / f"{name}.json"
    _write(path, result)
    return path


def _write(path: Path, value: Mapping[str, Any]) -> None:
    """The whole file, or none of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f"{path.name}.new")
    fresh.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    fresh.replace(path)


def stored(folder: Path) -> dict[str, dict[str, Any]]:
    """The results in a folder by name.

    Raises:
        UsageError: one of them is no JSON.
    """
    try:
        return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    except json.JSONDecodeError as error:
        raise UsageError(f"A stored study must be JSON. Got {folder}: {error}. Run the study again.") from error
