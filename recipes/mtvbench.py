"""The prompt files of MTVBench (github.com/xylstudy/mtvbench, folder prompts), read as they are. No torch.

Text: one prompt per line, indented or not, and a line ### after each group. JSON: {"0": {"video": "...", "prompts":
[...]}, "1": ...}. Groups are counted from 1, as its videos V_1.mp4, V_2.mp4 are. Neither file says what kind of
transition a group is.
"""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

from probe.errors import UsageError

RULE = "###"
Groups = list[tuple[int, list[str]]]
"""(number from 1, prompts) of each group."""


def read(path: Path) -> Groups:
    """The groups of a file.

    Raises:
        UsageError: not readable, not of this format, without a group, or a group of fewer than two prompts.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"Prompts must be readable UTF-8 text. Got {path.name}: {error}. Check the file.") from error
    groups = READERS[path.suffix.lower()](text, path.name)
    if len(dict(groups)) < len(groups):
        raise UsageError(f"{path.name}: every group must have a number of its own. Got one twice. Count the groups.")
    for number, prompts in groups:
        if len(prompts) < 2:
            raise UsageError(
                f"{path.name}, group {number}: a group must have two prompts or more. Got {len(prompts)}. Divide "
                f"groups, not prompts, by {RULE}."
            )
    if not groups:
        raise UsageError(f"A file of MTVBench must hold groups of prompts. Got none in {path.name}. Check the file.")
    return groups


def _of_text(text: str, name: str) -> Groups:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    groups = [list(part) for rule, part in groupby(lines, lambda line: line == RULE) if not rule]
    return list(enumerate(groups, start=1))


def _of_json(text: str, name: str) -> Groups:
    try:
        entries = json.loads(text)
    except ValueError as error:
        raise UsageError(f"A .json file of prompts must be JSON. Got {name}: {error}. Check the file.") from error
    if not isinstance(entries, dict):
        raise UsageError(f'{name} must map numbers to groups, {{"0": {{"prompts": [...]}}}}. Got no mapping. Check it.')
    return [(_number(key, name), _prompts(key, entry, name)) for key, entry in entries.items()]


def _number(key: str, name: str) -> int:
    if not (key.isascii() and key.isdecimal() and len(key) < 10):
        raise UsageError(f"{name}: the keys of groups must be numbers from 0 on. Got {key!r}. Count the groups.")
    return int(key) + 1


def _prompts(key: str, entry: Any, name: str) -> list[str]:
    prompts = entry.get("prompts") if isinstance(entry, dict) else None
    if not isinstance(prompts, list) or not all(isinstance(one, str) and one.strip() for one in prompts):
        raise UsageError(f"{name}, entry {key}: prompts must be a list of texts. Got {str(prompts)[:80]}. Mend it.")
    return [one.strip() for one in prompts]


READERS = {".txt": _of_text, ".json": _of_json}
"""By the ending of a file."""
