"""Clips of a recipe in memory, over and over with one loaded model: what studies are made of."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from hashlib import sha256
from typing import Any

import numpy as np
from torch import Tensor

from probe.errors import UsageError
from probe.models.load import load
from recipes.catalogue import interventions
from recipes.effect import Clip, Made
from recipes.job import prepare
from recipes.kept import masks_of
from recipes.language import parse
from recipes.language.recipe import Recipe
from recipes.loaded import Loaded, opened


class Clips(Mapping[str, Clip]):
    """The clips of a run by name, decoded when they are looked at; the same latents are decoded once.

    `latents` are [1, F, C, H, W] by name.
    """

    def __init__(self, latents: Mapping[str, Tensor], decode: Callable[[Tensor], Any], kept: dict[bytes, Clip]) -> None:
        self.latents, self._decode, self._kept = latents, decode, kept

    def __getitem__(self, name: str) -> Clip:
        latents = self.latents[name]
        key = sha256(latents.float().cpu().numpy().tobytes()).digest()
        if key not in self._kept:
            self._kept[key] = self._decode(latents)
        return self._kept[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.latents)

    def __len__(self) -> int:
        return len(self.latents)


class Studio:
    """Makes the clips of one recipe under changing overrides and seeds; every model is loaded once."""

    def __init__(self, recipe: str) -> None:
        self.recipe = recipe
        self._pipes: dict[str, Any] = {}
        self._made: dict[str, Made] = {}
        self._decoded: dict[bytes, Clip] = {}

    @property
    def counts(self) -> dict[str, int]:
        """Layers and heads of the recipe's model."""
        size = prepare(parse.load(self.recipe)).size
        return {"layers": size.layers, "heads": size.heads}

    def __call__(self, overrides: Mapping[str, Any], seed: int) -> Made:
        """What the recipe makes from a seed; `overrides` as `--set` takes them, with values for texts. Asked again, it
        is not made again.

        Raises:
            MmditError: a recipe that cannot run, or a model without a denoising loop of our own.
        """
        recipe = parse.load(self.recipe, [*_settings(overrides), f"sampler.seed={seed}"])
        key = parse.dump(recipe)
        if key not in self._made:
            self._made[key] = self._make(recipe)
        return self._made[key]

    def check(self, overrides: Mapping[str, Any]) -> str:
        """The text of the recipe under overrides, which can run as far as it alone can tell.

        Raises:
            MmditError: it cannot.
        """
        recipe = parse.load(self.recipe, _settings(overrides))
        interventions(prepare(recipe))
        return parse.dump(recipe)

    def _make(self, recipe: Recipe) -> Made:
        job = prepare(recipe)
        if job.size.clip is None:
            raise UsageError(
                f"A study must run on a model with a denoising loop of our own, CogVideoX. Got {job.size.family.name}."
            )
        made = interventions(job)
        loaded = opened(job, made, lambda: self._pipe(recipe.model))
        start = loaded.start()
        state = loaded.traced.run(lambda clock: loaded.drive(clock, start, lambda _: None), recipe.texts)
        clips = Clips({name: latents for name, _, latents in loaded.parts(state)}, loaded.decode, self._decoded)
        return Made(clips, dict(zip(recipe.prompt_names, recipe.texts, strict=True)), masks_of(made), _numbers(loaded))

    def _pipe(self, model: str) -> Any:
        if model not in self._pipes:
            self._pipes[model] = load(model)
        return self._pipes[model]


def _settings(overrides: Mapping[str, Any]) -> list[str]:
    """As `--set` takes them."""
    return [f"{key}={json.dumps(value)}" for key, value in overrides.items()]


def _numbers(loaded: Loaded) -> dict[str, float]:
    """Means of the readouts' numbers over the whole run, by name; the last prompt's where there are several."""
    told: dict[str, list[float]] = {}
    for readout in loaded.readouts:
        for at, value in readout.values.items():
            if at.branch.prompt == len(loaded.prompts) - 1:
                for name, numbers in readout.metrics(value).items():
                    told.setdefault(name, []).append(float(np.mean(numbers)))
    return {name: float(np.mean(values)) for name, values in told.items()}
