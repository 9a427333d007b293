"""Where a run came from: model, software, machine. Plain data for run.json. Imports torch only when asked of a
pipeline.
"""

from __future__ import annotations

import hashlib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = ("mmdit-lab", "torch", "diffusers", "transformers", "nnsight", "numpy", "h5py")
_SAMPLE = 1 << 20


def provenance(pipe: Any) -> dict[str, Any]:
    """Model, versions, dtype, device and attention kernel of a loaded pipeline."""
    import torch

    from probe import attend

    device, dtype = pipe._execution_device, pipe.transformer.dtype
    place = str(pipe.config.get("_name_or_path", "") or "")
    return {
        "model": {
            "name": Path(place).name if Path(place).is_dir() else place,
            "revision": getattr(pipe.transformer.config, "_commit_hash", None),
            "pipeline": type(pipe).__name__,
            "fingerprint": fingerprint(Path(place)),
            "scheduler": type(pipe.scheduler).__name__,
        },
        "dtype": str(dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "backend": attend.backend_name(device.type, dtype),
        "threads": torch.get_num_threads(),
        "versions": {name: version_of(name) for name in _PACKAGES},
    }


def where_from(info: dict[str, Any]) -> dict[str, Any]:
    """The part of `provenance` that every step file repeats, so that it can be read alone."""
    model = info["model"]
    return {
        "model": model["name"],
        "fingerprint": model["fingerprint"],
        "dtype": info["dtype"],
        "backend": info["backend"],
    }


def fingerprint(folder: Path) -> str | None:
    """Short hash of a pipeline folder: every configuration, and the first megabyte and the size of every weight
    file.
    """
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for file in sorted(
        f for f in (*folder.glob("*.json"), *folder.glob("*/*")) if f.suffix in (".json", ".safetensors")
    ):
        with file.open("rb") as stream:
            digest.update(f"{file.relative_to(folder)} {file.stat().st_size}".encode())
            digest.update(stream.read(_SAMPLE))
    return digest.hexdigest()[:16]


def version_of(package: str) -> str | None:
    """The installed version of a package, None without it."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
