"""One run of a sweep after the other, with models and features that are loaded once."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

from probe.errors import MmditError, StoreError
from probe.models.load import load
from probe.store import Run
from recipes import features
from recipes.evaluate import evaluate
from recipes.quiet import quiet_libraries
from recipes.run import Place, execute, go_on
from recipes.sweep import Task
from recipes.sweep_store import Row


class Maker:
    """Makes runs on one device; None is CUDA if there is one."""

    def __init__(self, device: str | None = None) -> None:
        quiet_libraries()
        self.device = device
        self._pipes: dict[str, Any] = {}
        self._features: dict[str, Any] = {}

    def __call__(self, task: Task) -> Row:
        """The row of a run, which is made, gone on with, or only measured where it is finished. What goes wrong is the
        row's sentence; an interrupt is raised.
        """
        try:
            run = self._run(task)
            return Row.done(task, run.info.get("seconds"), self._metrics(run, task.features))
        except MmditError as error:
            if isinstance(error.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt from error
            return Row.failed(task, str(error))
        except Exception as error:
            return Row.failed(task, f"Something unexpected went wrong. Got {type(error).__name__}: {error}.")

    def _run(self, task: Task) -> Run:
        place = Place(self.device, pipe=self._pipe(task.recipe.model))
        with contextlib.suppress(StoreError):  # none there, or one that cannot go on
            run = Run(task.folder)
            return run if run.status == "done" else go_on(task.folder, quiet=True, place=place)
        return execute(task.recipe, task.folder, task.folder.exists(), quiet=True, place=place)

    def _pipe(self, model: str) -> Any:
        if model not in self._pipes:
            self._pipes[model] = load(model, device=self.device)
        return self._pipes[model]

    def _metrics(self, run: Run, name: str | None) -> dict[str, float]:
        if name is None:
            return {}
        if name not in self._features:
            self._features[name] = features.load(name, self.device)
        return numbers(evaluate(run, self._features[name]))


def numbers(told: Mapping[str, Any]) -> dict[str, float]:
    """What can be averaged: finite numbers, and yes or no as 1 or 0."""
    real = {name: float(value) for name, value in told.items() if isinstance(value, Real)}
    return {name: value for name, value in real.items() if math.isfinite(value)}
