"""Load a pipeline so that it can be called as it is, `load("miniature")`, a diffusers id, or a folder; or only its
transformers, to check them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from probe.errors import ModelError
from probe.models.family import Family
from probe.models.place import place_of
from probe.models.registry import family_named, family_of, known

MINIATURE = Path(__file__).resolve().parents[2] / "data" / "miniature"


def locate(model: str) -> str:
    """The folder of "miniature", any other folder or id as it is.

    Raises:
        ModelError: the miniature is not part of this install, or a path does not exist.
    """
    folder = _folder(model)
    if folder is not None and not (folder / "model_index.json").is_file():
        raise ModelError(
            f"A pipeline folder must hold model_index.json. Got {model}, which has none. Give the folder that "
            "save_pretrained made."
        )
    return model if folder is None else str(folder)


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
    from diffusers import DiffusionPipeline

    device, dtype = place_of(device, dtype)
    place = locate(model)
    checkpoints_of(model)  # an unknown family is refused before anything heavy is read
    try:
        pipe = DiffusionPipeline.from_pretrained(place, dtype=dtype, use_safetensors=True, **kwargs)
    except Exception as error:  # diffusers, safetensors and the hub raise what they like
        raise _unloadable("pipeline", model, error) from error
    family = family_of(pipe.transformer)
    with_defaults(pipe, family.call_defaults(pipe) | card(place))
    pipe.set_progress_bar_config(disable=True)
    if offload:
        pipe.enable_model_cpu_offload(device=device)
        return pipe
    return pipe.to(device)


@dataclass(frozen=True)
class Bare:
    """A transformer without a pipeline: enough for `prove`, and for `trace(...).run` over a loop that tells the
    clock.
    """

    transformer: Any


@dataclass(frozen=True)
class Checkpoint:
    """One transformer that is not loaded yet: its family, and where it lies: `part` ("" or a subfolder) of the folder
    or hub id `model`.
    """

    family: Family
    model: str
    part: str = ""

    def config(self) -> dict[str, Any]:
        """The transformer's configuration.

        Raises:
            ModelError: it cannot be read.
        """
        import diffusers

        kind: Any = getattr(diffusers, self.family.transformer)
        try:
            return kind.load_config(self.model, subfolder=self.part or None)
        except Exception as error:  # as above
            raise _unloadable("configuration", self.model, error) from error

    def load(self, *, device: str | None = None, dtype: Any = None) -> Bare:
        """The transformer alone, in evaluation mode; `device` and `dtype` as in `load`.

        Raises:
            ModelError: not loadable (the cause is named), or some of its weights are missing.
        """
        import diffusers

        device, dtype = place_of(device, dtype)
        kind: Any = getattr(diffusers, self.family.transformer)
        given = {"dtype": dtype, "use_safetensors": True, "output_loading_info": True}
        try:
            transformer, told = kind.from_pretrained(self.model, subfolder=self.part or None, **given)
        except Exception as error:  # as above
            raise _unloadable("transformer", self.model, error) from error
        missing = sorted(told["missing_keys"])
        if missing:
            raise ModelError(
                f"A checkpoint must hold every weight of its {self.family.transformer}. Got {self.model} without "
                f"{len(missing)} of them, {missing[0]} first. Download it again, or correct its config.json."
            )
        return Bare(transformer.to(device))


def checkpoints_of(model: str) -> tuple[Checkpoint, ...]:
    """The transformers of a model, known by its configuration alone: "miniature", a pipeline or a bare transformer, as
    a folder or a hub id. Wan 2.2 has two.

    Raises:
        ModelError: not found, without a readable configuration, or of an unknown family.
    """
    folder = _folder(model)
    configured = _configurations(model) if folder is None else folder
    classes = _classes(configured, model)
    place = model if folder is None else str(folder)
    return tuple(Checkpoint(family_named(name), place, part) for part, name in classes.items())


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


_PARTS = ("transformer", "transformer_2")
_INDEX, _CONFIG = "model_index.json", "config.json"


def _folder(model: str) -> Path | None:
    """The folder a model is in, None for a hub id."""
    if model == "miniature":
        if not (MINIATURE / _INDEX).is_file():
            raise ModelError(
                f"The miniature must lie in the project's data folder. Got an install without it ({MINIATURE}). Work "
                "in a clone (pip install -e .), or name another model with --model."
            )
        return MINIATURE
    folder = Path(model).expanduser()
    if model and folder.is_dir():
        return folder
    if folder.exists() or model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise ModelError(
            f"A model must be 'miniature', a folder or a hub id (owner/name). Got {model}, which is none of these."
        )
    return None


def _configurations(model: str) -> Path:
    """A local folder with the configuration files of a hub id."""
    from huggingface_hub import snapshot_download

    wanted = [_INDEX, _CONFIG, *(f"{part}/{_CONFIG}" for part in _PARTS)]
    try:
        return Path(snapshot_download(model, allow_patterns=wanted))
    except Exception as error:  # not there, no access, no connection
        raise ModelError(
            f"A hub id must be on the hub, or in the local cache when there is no connection. Got {model}: "
            f"{_cause(error)}. Check the id and the connection."
        ) from error


def _classes(folder: Path, model: str) -> dict[str, str]:
    """The class of each transformer by its subfolder, "" for the folder itself."""
    index = _read(folder / _INDEX)
    if index is not None:
        named = {part: entry[1] for part in _PARTS if (entry := index.get(part)) and entry[1]}
        if not named:
            parts = ", ".join(name for name, entry in index.items() if isinstance(entry, list))
            raise ModelError(
                f"A pipeline must have a transformer. Got {index.get('_class_name')} with {parts}. Known: {known()}."
            )
        return named
    configs = {part: _read(folder / part / _CONFIG) for part in ("", *_PARTS)}
    found = {part: str(config.get("_class_name")) for part, config in configs.items() if config is not None}
    if not found:
        raise ModelError(
            f"A model must hold {_INDEX} (a pipeline) or {_CONFIG} (a transformer). Got {model}, which has neither. "
            "Give the folder that save_pretrained made."
        )
    return {"": found[""]} if "" in found else found


def _read(file: Path) -> Mapping[str, Any] | None:
    """A configuration file, None if it is not there."""
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text())
    except ValueError as error:
        raise ModelError(f"A configuration must be JSON. Got {file}: {error}. Download it again.") from error
    if not isinstance(found, dict):
        raise ModelError(f"A configuration must be a JSON object. Got {file}, a {type(found).__name__}.")
    return found


def _unloadable(what: str, model: str, error: Exception) -> ModelError:
    return ModelError(
        f"A {what} must load with diffusers. Got {model}: {_cause(error)}. Check the id or folder, or download it "
        "again."
    )


def _cause(error: Exception) -> str:
    """What a library raised, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300].rstrip('.')}"
