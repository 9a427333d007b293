"""Where a model computes, and in which dtype."""

from __future__ import annotations

from typing import Any

from probe.errors import UsageError


def place_of(device: str | None = None, dtype: Any = None) -> tuple[str, Any]:
    """Where a model computes and in which torch dtype: CUDA if there is one; float32 on the CPU, bfloat16 on a GPU.
    `dtype` may be given by its name.

    Raises:
        UsageError: no device, or a GPU that torch does not see.
    """
    import torch

    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = device or ("cuda" if there else "cpu")
    name, _, number = device.partition(":")
    if name not in ("cpu", "cuda") or (":" in device and not (number.isascii() and number.isdecimal())):
        raise UsageError(f"A device must be cpu, cuda or one GPU of several, cuda:1. Got {device!r}. Name one.")
    if name == "cuda" and int(number or 0) >= there:
        seen = f"{there} GPU{'s' if there > 1 else ''}" if there else "no GPU"
        raise UsageError(f"A device must be there. Got {device}, and torch sees {seen}. Take --device cpu.")
    usual = torch.float32 if name == "cpu" else torch.bfloat16
    return device, getattr(torch, dtype) if isinstance(dtype, str) else dtype or usual
