"""resume.h5: the one state from which a stopped run goes on.

    attrs       format, schema, step (the step after which the state holds)
    state/      arrays with their exact types; bytes as uint8 with the attribute kind = bytes; anything else attributes

It is replaced after the file of its step is in place, so that it never runs ahead of the records.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from probe import folder
from probe.errors import StoreError
from probe.store_read import check_format, open_file, read_attrs
from probe.store_step import put_attrs

RESUME_FORMAT = "mmdit-lab resume"

AGAIN = "Start the run again; its finished steps stay readable."


def pack_resume(step: int, state: Mapping[str, Any]) -> memoryview:
    """Return the bytes of resume.h5: arrays (any numpy type) and bytes are kept exactly, other values as plain data.

    Raises:
        StoreError: a name has a slash, or a value cannot be stored.
    """
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        put_attrs(file, {"format": RESUME_FORMAT, "schema": folder.SCHEMA, "step": step})
        group = file.create_group("state")
        for name, value in state.items():
            if not name or "/" in name or name == ".":
                raise StoreError(f"resume names must be plain words. Got {name!r}. Leave out the slash.")
            if isinstance(value, bytes):
                group[name] = np.frombuffer(value, np.uint8)
                group[name].attrs["kind"] = "bytes"
            elif isinstance(value, np.ndarray):
                group[name] = value
            else:
                put_attrs(group, {name: value})
    return buffer.getbuffer()


def read_resume(path: Path) -> tuple[int, dict[str, Any]]:
    """Return the step and its state, as they were given.

    Raises:
        StoreError: the file is absent, damaged, foreign, or of another schema.
    """
    if not path.is_file():
        raise StoreError(f"run must hold a resume state. Got no {path.name} in {path.parent}. {AGAIN}")
    with open_file(path, "resume state", AGAIN) as file:
        attrs = read_attrs(file)
        check_format(attrs, path, "resume state", RESUME_FORMAT, AGAIN)
        group = file["state"]
        found = read_attrs(group)
        for name, data in group.items():
            array = np.asarray(data[()])
            found[name] = array.tobytes() if data.attrs.get("kind") == "bytes" else array
        return int(attrs["step"]), found
