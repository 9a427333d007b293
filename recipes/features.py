"""Features of frames and prompts from a CLIP: the small one that comes with the miniature, or any of transformers.

features = load("miniature")                       # or a folder, or openai/clip-vit-base-patch32
pooled, embedded = features.images(frames)         # [F, D] for CSCV, [F, E] beside features.texts(prompts) [P, E]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from probe.errors import ModelError

SMALL = Path(__file__).resolve().parents[1] / "data" / "miniature" / "features"
"""The small CLIP of a clone: it knows the miniature's world and nothing else."""

BATCH = 32
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Features:
    """A CLIP with its picture processor and its tokenizer; made by `load`."""

    name: str
    model: Any
    processor: Any
    tokenizer: Any

    def images(self, frames: NDArray[np.uint8]) -> tuple[Floats, Floats]:
        """(pooled [F, D], embedded [F, E]) of frames uint8 [F, H, W, 3]: the vision model's pooled output, and its
        projection into the space of the texts.

        Each frame is halved by a box filter while its shorter side is twice the model's or more, then brought to it
        (bicubic), cropped to the middle and normalised as the model's preprocessor_config.json says. The halving is
        that of DiTCtrl's metrics/cscv_metric.py at 5fe30bd; the rest is the model's own.
        """
        import torch

        pooled, embedded = [], []
        with torch.inference_mode():
            for some in _batches(frames):
                pictures = [_halved(frame, self.size) for frame in some]
                pixels = self.processor(images=pictures, return_tensors="pt")["pixel_values"]
                found = self.model.vision_model(pixel_values=pixels.to(self.model.device)).pooler_output
                pooled.append(found.cpu().numpy())
                embedded.append(self.model.visual_projection(found).cpu().numpy())
        return np.concatenate(pooled), np.concatenate(embedded)

    def texts(self, prompts: Sequence[str]) -> Floats:
        """Embeddings [P, E] of prompts. A longer prompt is cut after the tokens that the model reads (77 of OpenAI's,
        20 of the small one), as everywhere with CLIP.
        """
        import torch

        options: dict[str, Any] = {"padding": True, "truncation": True, "return_tensors": "pt"}
        told = self.tokenizer(list(prompts), max_length=self.longest, **options).to(self.model.device)
        given = {name: told[name] for name in ("input_ids", "attention_mask")}
        with torch.inference_mode():
            return self.model.get_text_features(**given).pooler_output.cpu().numpy()

    @property
    def size(self) -> int:
        """Pixels of the model's pictures."""
        return int(self.model.config.vision_config.image_size)

    @property
    def longest(self) -> int:
        """Tokens of a text that the model reads."""
        return int(self.model.config.text_config.max_position_embeddings)


def load(name: str = "miniature", device: str | None = None) -> Features:
    """The features called "miniature", those in a folder, or a CLIP by its hub id, in float32 on `device` (CUDA if
    there is one).

    Raises:
        ModelError: not found, or no CLIP.
    """
    import torch
    from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessorPil, CLIPModel

    place = locate(name)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        kind = CLIPConfig.get_config_dict(place)[0].get("model_type")
        if kind != "clip":
            raise ValueError(f"its model_type is {kind}, not clip")
        given: dict[str, Any] = {"dtype": torch.float32, "output_loading_info": True}
        model, told = cast(Any, CLIPModel.from_pretrained(place, **given))
        if told["missing_keys"]:
            raise ValueError(f"its weights lack {min(told['missing_keys'])}")
        processor, tokenizer = CLIPImageProcessorPil.from_pretrained(place), AutoTokenizer.from_pretrained(place)
    except Exception as error:  # transformers, safetensors and the hub raise what they like
        cause = " ".join(str(error).split())[:300].rstrip(".")
        raise ModelError(
            f"Features must be a CLIP of transformers. Got {name}: {type(error).__name__}: {cause}. Take miniature, a "
            "folder, or an id such as openai/clip-vit-base-patch32."
        ) from error
    return Features(name, model.to(device).eval(), processor, tokenizer)


def locate(name: str) -> str:
    """The folder of "miniature" or of a path, a hub id as it is.

    Raises:
        ModelError: the small model is not part of this install, or a path does not exist.
    """
    if name == "miniature":
        if not (SMALL / "config.json").is_file():
            raise ModelError(
                f"The miniature's features must lie in the project's data folder. Got an install without ({SMALL}). "
                "Work in a clone (pip install -e .), or name others with --features."
            )
        return str(SMALL)
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        return str(folder)
    if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ModelError(
            f"Features must be 'miniature', a folder or a hub id (owner/name). Got {name}, which is none of these."
        )
    return name


def _batches(frames: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
    for start in range(0, len(frames), BATCH):
        yield frames[start : start + BATCH]


def _halved(frame: NDArray[np.uint8], size: int) -> Image.Image:
    picture = Image.fromarray(frame)
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    return picture
