"""The state of a stopped run: kept beside the step files, and checked before a run goes on from it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from control.denoise import State
from ditctrl.sharing import Chunks
from probe.errors import StoreError
from probe.store import Run
from recipes.language import parse
from recipes.language.recipe import Recipe

SOFTWARE = ("versions", "device", "backend", "threads", "dtype", "model")
NUMBERS = ("recipe", "steps", "guidance", "overlap", "shared steps", "shared layers")


def kept_of(state: State, timestep: int) -> dict[str, Any]:
    """What is kept of the newest step: latents, the sampler's memory, its last timestep and the random state."""
    kept = {
        "step": state.step,
        "latents": _array(state.latents),
        "timestep": timestep,
        "generator": state.generator.numpy(),
    }
    return kept if state.previous_x0 is None else kept | {"previous_x0": _array(state.previous_x0)}


def recipe_of(run: Run) -> Recipe:
    """The recipe a stopped run was made from.

    Raises:
        StoreError: the run is done, still being written, or ended because its recipe cannot work.
    """
    if run.status in ("done", "running"):
        raise StoreError(
            f"A run to resume must have stopped early. Got one that is {run.status}, {run.path}. Start another."
        )
    if "recipe" not in run.info:
        raise StoreError(
            f"A run to resume must come from a recipe. Got {run.path}, made by probe.record. Record it again."
        )
    if run.info.get("refused"):
        raise StoreError(
            f"A run to resume must not have been refused. Got {run.path}, whose recipe cannot work: "
            f"{run.info.get('error')} Start it anew with another recipe."
        )
    return parse.load(str(run.path / "recipe.yaml"))


def chunks_of(run: Run) -> Chunks | None:
    """How the segments of the stopped run were spread over forwards; None of a run without segments."""
    kept = run.info.get("chunks")
    return None if kept is None else Chunks(**kept)


def refuse_carried(run: Run, carried: str) -> None:
    """Refuse to go on where more than the latents is carried from step to step: it is not kept on disk.

    Raises:
        StoreError: steps were finished, and they made such things.
    """
    if carried and run.steps:
        raise StoreError(
            f"A run to resume must carry nothing but its latents from step to step. Got {carried} in {run.path}, which "
            "are not kept on disk. Start the recipe again."
        )


def state_of(run: Run, now: dict[str, Any], start: State) -> State:
    """The state of the newest step that has one, or `start` where a run stopped before; dtype and device of `start`.

    Raises:
        StoreError: software, device, threads or model differ from those of the run: its bits would not go on; or
            resume.h5 is damaged, or gone.
    """
    for name in (*SOFTWARE, *NUMBERS):
        if run.info.get(name) != now.get(name):
            raise StoreError(
                f"A resumed run must go on with the same software, machine, model and recipe. Got another {name}: "
                f"{now.get(name)} instead of {run.info.get(name)}. Restore it, or start the recipe again."
            )
    if not run.has_state and len(run.steps) <= 1:  # stopped before the state of its first step was there
        return start
    kept = run.resume()[1]
    x0 = torch.from_numpy(kept["previous_x0"]).to(start.latents.device) if "previous_x0" in kept else None
    latents = torch.from_numpy(kept["latents"]).to(start.latents)
    return replace(
        start, step=int(kept["step"]), latents=latents, previous_x0=x0, generator=torch.from_numpy(kept["generator"])
    )


def _array(tensor: torch.Tensor) -> Any:
    return (tensor if tensor.dtype == torch.float64 else tensor.float()).cpu().numpy()
