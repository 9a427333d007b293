"""What is installed here, and what works."""

from __future__ import annotations

import os
import platform
from importlib.util import find_spec
from typing import Any

from probe import film
from probe.provenance import version_of

PACKAGES = ("mmdit-lab", "torch", "diffusers", "transformers", "nnsight", "h5py", "streamlit")


def examine() -> dict[str, Any]:
    """Versions, device, attention kernel against float64, ffmpeg, the miniature."""
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
    }
    facts |= {name: version_of(name) or "not installed" for name in PACKAGES}
    facts["ffmpeg"] = _ffmpeg()
    facts |= (
        _torch()
        if find_spec("torch")
        else {"torch": 'not installed: runs can be read; pip install ".[model]" to make them'}
    )
    return facts


def _torch() -> dict[str, Any]:
    import torch

    from probe import attend
    from probe.errors import MmditError
    from probe.models.load import MINIATURE
    from probe.models.place import place_of

    device, dtype = place_of()
    try:
        errors = attend.verify(device, dtype)
        kernel = f"{attend.backend_name(device, dtype)}, error against float64 {max(errors.values()):.1e}"
    except MmditError as error:
        kernel = str(error)
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    there = (MINIATURE / "model_index.json").is_file()
    return {"device": name, "attention kernel": kernel, "miniature": "there" if there else "not in this install"}


def _ffmpeg() -> str:
    if not film.has_ffmpeg():
        return "not installed: GIF only"
    import imageio_ffmpeg

    return f"bundled {imageio_ffmpeg.get_ffmpeg_version()}"
