"""A longer video in windows, as numbers for the model at hand: where they begin, and the prompt each shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from control.overlap import Shape, starts_of
from probe.errors import UsageError
from probe.site import Branch
from recipes.language.recipe import Recipe


@dataclass(frozen=True)
class Cut:
    """`frames` latent frames in windows of `length` frames that begin at `starts`; each shows one of the prompts."""

    frames: int
    length: int
    starts: tuple[int, ...]
    prompts: tuple[int, ...]
    weights: Shape

    @property
    def shown(self) -> tuple[Branch, ...]:
        """The conditional branch of each window."""
        return tuple(Branch(prompt=prompt, segment=window) for window, prompt in enumerate(self.prompts))


def cut_of(recipe: Recipe, length: int) -> Cut | None:
    """The windows of a recipe on a model with clips of `length` latent frames; None where it has none.

    Raises:
        UsageError: windows that do not cover the video, or other prompts than there are windows.
    """
    asked = recipe.windows
    if asked is None:
        return None
    stride = max(1, length // 4) if asked.stride == "auto" else asked.stride
    starts = starts_of(asked.frames, length, stride)
    prompts = _prompts(recipe, asked.prompts, len(starts))
    return Cut(asked.frames, length, starts, prompts, asked.weights)


def _prompts(recipe: Recipe, names: Sequence[str] | None, count: int) -> tuple[int, ...]:
    """The prompt of each window: as named, or all of them in equal shares."""
    if names is None:
        several = len(recipe.texts)
        if several > count:
            raise UsageError(
                f"windows must be as many as the prompts, or more. Got {count} for {several} prompts. Ask for more "
                "frames, or a shorter stride."
            )
        return tuple(window * several // count for window in range(count))
    if len(names) != count:
        raise UsageError(
            f"windows.prompts must name one prompt for each of the {count} windows. Got {len(names)}. Name {count}, or "
            "leave it out."
        )
    return tuple(map(recipe.prompt_index, names))
