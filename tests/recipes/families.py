"""What every shipped recipe does on the families that run through their stock pipeline: real classes, random weights,
as many layers and heads, as large a grid and the same words as the miniature, four steps.

    python -m tests.recipes.families [RECIPE...]

writes what was seen to `data/families.json`, of which the README's table is made; of all recipes, or of some.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tqdm import tqdm

from probe.errors import MmditError
from probe.tracer import trace
from probe.word import words_of
from recipes import stock
from recipes.catalogue import interventions, readouts
from recipes.job import Job, prepare
from recipes.language import parse
from recipes.study_table import FAMILIES, RUNS
from tests import tiny
from tests.toys import Case
from tests.toys.sd3 import QK_NORMS, SHARP

TEXT = 32
"""Text tokens, so that the longest prompt of the recipes fits."""

_VIDEO = {"height": 128, "width": 128, "num_frames": 17}
CALLS: dict[str, dict[str, Any]] = {
    "hunyuan": _VIDEO,
    "mochi": {**_VIDEO, "num_frames": 25, "max_sequence_length": TEXT},
    "sd3": {"height": 128, "width": 128, "max_sequence_length": TEXT},
    "flux": {"height": 128, "width": 128, "max_sequence_length": TEXT},
    "wan": _VIDEO,
}
"""A grid of 8 x 8, and of 5 frames where there are frames."""

PICTURES = ("sd3", "flux")

_HALF = {"num_layers": 4, "num_single_layers": 4, "num_attention_heads": 8}
_WHOLE = {"num_layers": 8, "num_attention_heads": 8}
CONFIGS: dict[str, dict[str, Any]] = {
    "hunyuan": _HALF,
    "mochi": _WHOLE,
    "sd3": {**_WHOLE, "caption_projection_dim": 128},
    "flux": _HALF,
    "wan": _WHOLE,
}


def pipeline(family: str, folder: Path) -> Any:
    """A pipeline of a family, its weights drawn; what a recipe reads of a model is written to `folder`."""
    spoken = {word for name in parse.names() for text in parse.load(name).texts for word in words_of(text)}
    with mock.patch.object(tiny, "WORDS", sorted(spoken)), mock.patch.object(tiny, "TEXT", TEXT):
        pipe = Case(family).pipeline()
    kind = type(pipe.transformer)
    torch.manual_seed(0)
    model = kind.from_config({**pipe.transformer.config, **CONFIGS[family]})
    for key, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=SHARP if f".{key}".split(".")[-2] in QK_NORMS else 0.1)
    pipe.transformer = model.eval()
    if family in PICTURES:
        pipe.vae_scale_factor = 8  # that of the real ones; nothing is decoded
    pipe.save_pretrained(folder)
    return pipe


def outcome(name: str, family: str, folder: Path, pipe: Any) -> str:
    """How a recipe ends on a family: `RUNS`, or the sentence that refuses it."""
    try:
        job, edited = _latents(name, family, folder, pipe, {})
    except MmditError as error:
        return str(error).replace(str(folder), family)
    if not torch.isfinite(edited).all():
        return "gives no finite numbers"
    if job.recipe.edits and torch.equal(edited, _latents(name, family, folder, pipe, {"edits": []})[1]):
        return "changes nothing"
    return RUNS


def _latents(name: str, family: str, folder: Path, pipe: Any, more: dict[str, Any]) -> tuple[Job, torch.Tensor]:
    sets = {"model": str(folder), "sampler.steps": 4, "sampler.guidance": 3, "call": CALLS[family], **more}
    job = prepare(parse.load(name, [f"{key}={json.dumps(value)}" for key, value in sets.items()]))
    traced = trace(pipe, *interventions(job).handlers, *readouts(job))
    shared, seed = job.recipe.sampler.noise == "shared", job.recipe.sampler.seed
    noise = [torch.Generator().manual_seed(seed + (0 if shared else at)) for at in range(len(job.recipe.texts))]
    made = traced(prompt=list(job.recipe.texts), generator=noise, output_type="latent", **stock.call_of(job))
    return job, made[0]


def main(names: list[str]) -> None:
    """Run recipes and write what was seen; of others what is there stays."""
    warnings.filterwarnings("ignore", "In CPU autocast")
    logging.disable(logging.WARNING)
    before = json.loads(FAMILIES.read_text(encoding="utf-8")) if names else {}
    seen: dict[str, dict[str, str]] = {name: {} for name in names or parse.names()}
    for family in CALLS:
        with tempfile.TemporaryDirectory() as folder:
            pipe = pipeline(family, Path(folder))
            for name in tqdm(seen, desc=family):
                seen[name][family] = outcome(name, family, Path(folder), pipe)
    whole = {name: {**before, **seen}[name] for name in parse.names()}
    FAMILIES.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
