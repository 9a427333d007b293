"""Load a pipeline so that it can be called as it is: `load("miniature")`, a diffusers id, or a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from probe.errors import ModelError
from probe.models.registry import FAMILIES, family_of

MINIATURE = Path(__file__).resolve().parents[2] / "data" / "miniature"


def locate(model: str) -> str:
    """The folder of "miniature", any other folder or id as it is.

    Raises:
        ModelError: the miniature is not part of this install, or a path does not exist.
    """
    if model == "miniature":
        if not (MINIATURE / "model_index.json").is_file():
            raise ModelError(
                f"The miniature must lie in the project's data folder. Got an install without it ({MINIATURE}). Work "
                "in a clone (pip install -e .), or name another model with --model."
            )
        return str(MINIATURE)
    looks_local = model.startswith((".", "/", "~")) or model.count("/") != 1
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise ModelError(
                f"A pipeline folder must hold model_index.json. Got {model}, which has none. Give the folder that "
                "save_pretrained made."
            )
        return str(folder)
    if looks_local:
        raise ModelError(
            f"A model must be 'miniature', a pipeline folder or a hub id (owner/name). Got {model}, which is none of "
            "these."
        )
    return model


def load(
    model: str = "miniature", *, device: str | None = None, dtype: Any = None, offload: bool = False, **kwargs: Any
) -> Any:
    """A diffusers pipeline of a known family, in evaluation mode on `device` (CUDA if there is one).

    It is the stock class; only the defaults of its call are filled in: what the model needs (`max_sequence_length`)
    and what its card recommends (`miniature.json`). `dtype` defaults to float32 on the CPU and bfloat16 on a GPU.
    `offload` keeps the parts that are not at work on the CPU.

    Raises:
        ModelError: not found, not loadable (the cause is named), or of an unknown family.
    """
    import torch
    from diffusers import DiffusionPipeline

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or (torch.float32 if device == "cpu" else torch.bfloat16)
    place = locate(model)
    try:
        pipe = DiffusionPipeline.from_pretrained(place, dtype=dtype, use_safetensors=True, **kwargs)
    except Exception as error:  # diffusers, safetensors and the hub raise what they like
        cause = " ".join(str(error).split())[:300]
        raise ModelError(
            f"A pipeline must load with diffusers. Got {model}: {type(error).__name__}: {cause}. Check the id or "
            "folder, or download it again."
        ) from error
    if getattr(pipe, "transformer", None) is None:
        names = ", ".join(name for family in FAMILIES for name in family.pipelines)
        raise ModelError(f"A pipeline must have a transformer. Got {type(pipe).__name__}. Known pipelines: {names}.")
    family = family_of(pipe.transformer)
    with_defaults(pipe, family.call_defaults(pipe) | card(place))
    pipe.set_progress_bar_config(disable=True)
    if offload:
        pipe.enable_model_cpu_offload(device=device)
        return pipe
    return pipe.to(device)


def card(place: str) -> dict[str, Any]:
    """Call defaults a model folder recommends for itself, from its `miniature.json` if it has one."""
    file = Path(place) / "miniature.json"
    if not file.is_file():
        return {}
    wanted = json.loads(file.read_text())
    return {key: wanted[key] for key in ("guidance_scale", "num_inference_steps") if key in wanted}


def with_defaults(pipe: Any, defaults: dict[str, Any]) -> None:
    """Fill in defaults of the pipeline's own call; whatever the caller passes wins."""
    stock = type(pipe)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return stock.__call__(self, *args, **(defaults | kwargs))

    call.__doc__ = stock.__call__.__doc__
    pipe.__class__ = type(
        stock.__name__, (stock,), {"__call__": call, "__module__": stock.__module__, "defaults": defaults}
    )
