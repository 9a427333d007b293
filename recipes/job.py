"""A recipe with every "auto" resolved for the model it is for: numbers only, before any weight is loaded."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from control.schedule import dynamic_guidance, refuse_frames, refuse_steps
from ditctrl.segment import Segments
from ditctrl.sharing import Window
from probe.errors import UsageError
from probe.layout import TokenLayout
from probe.models.cogvideox import COGVIDEOX, clip_frames
from probe.models.family import Family
from probe.models.load import card, checkpoints_of
from probe.site import Where
from recipes.recipe import Auto, Recipe


@dataclass(frozen=True)
class Clip:
    """What our own loop must know of a clip: latent frames, pixel frames per latent frame, values of a latent frame."""

    frames: int
    compression: int
    latent_values: int


@dataclass(frozen=True)
class Size:
    """What the configuration of a model says: its family, layers, heads and their width, the sequence of one clip or
    picture. `clip` is None for a family that runs through its stock pipeline.
    """

    family: Family
    layers: int
    heads: int
    width: int
    layout: TokenLayout
    clip: Clip | None


@dataclass(frozen=True)
class Job:
    """A recipe and its numbers. `segments` and `window` are None where the recipe has none."""

    recipe: Recipe
    size: Size
    steps: int
    guidance: float
    segments: Segments | None
    window: Window | None

    @property
    def frames(self) -> int:
        """Latent frames of the video; token frames where the stock pipeline makes it."""
        clip = self.size.clip
        return self.segments.frames if self.segments else clip.frames if clip else self.size.layout.grid.frames

    @property
    def pixel_frames(self) -> int | None:
        """Frames of the video; None where the stock pipeline makes it."""
        return self.size.clip.compression * (self.frames - 1) + 1 if self.size.clip else None

    def scale(self, timestep: int) -> float:
        """The guidance scale at a training timestep."""
        if self.recipe.sampler.dynamic:
            return dynamic_guidance(timestep, self.steps, self.guidance)
        return self.guidance

    def resolved(self) -> dict[str, Any]:
        """Every "auto" as a number: what run.json keeps, and what a resumed run must find again."""
        return {
            "steps": self.steps,
            "guidance": self.guidance,
            "overlap": self.segments.overlap if self.segments else None,
            "shared steps": half_open(self.window.steps) if self.window else None,
            "shared layers": half_open(self.window.layers) if self.window else None,
        }

    def record_where(self) -> Where:
        """The calls that are recorded."""
        record = self.recipe.record
        if record is None:
            return Where(steps=(), layers=())
        return Where(
            steps=_span(record.steps, self.steps, "record.steps", "steps"),
            layers=_span(record.layers, self.size.layers, "record.layers", "layers"),
        )


def prepare(recipe: Recipe) -> Job:
    """Resolve a recipe against its model's configuration.

    Raises:
        ModelError: the model is not there or of an unknown family.
        UsageError: numbers that do not fit it (overlap, windows), or more than its stock pipeline can do.
    """
    checkpoint = checkpoints_of(recipe.model)[0]
    family, config = checkpoint.family, checkpoint.config()
    defaults = _call_defaults(family) | card(checkpoint.model)
    steps = int(_number(recipe.sampler.steps, defaults["num_inference_steps"]))
    guidance = float(_number(recipe.sampler.guidance, defaults["guidance_scale"]))
    size = _size(family, config, defaults | recipe.call)
    if size.clip is None:
        _refuse_more_than_stock(recipe, family)
        job = Job(recipe, size, steps, guidance, None, None)
    else:
        _refuse_call(recipe, family)
        segments = _segments(recipe, size.clip)
        job = Job(recipe, size, steps, guidance, segments, _window(recipe, steps, size))
        refuse_steps(job.steps)
    job.record_where()
    return job


def _segments(recipe: Recipe, clip: Clip) -> Segments | None:
    if recipe.segments is None:
        return None
    overlap = None if recipe.segments.overlap == "auto" else recipe.segments.overlap
    return Segments.scaled(len(recipe.prompts), clip.frames, recipe.segments.transitions, overlap)


def _refuse_more_than_stock(recipe: Recipe, family: Family) -> None:
    sampler = recipe.sampler
    asked = {
        "segments": recipe.segments is not None,
        "edits": bool(recipe.edits),
        f"scheduler {sampler.scheduler}": sampler.scheduler != "model",
        "dynamic guidance": sampler.dynamic,
        f"negative {sampler.negative}": sampler.negative != "empty",
    }
    more = [name for name, wanted in asked.items() if wanted]
    if more:
        raise UsageError(
            f"A recipe with {', '.join(more)} must have a model with a denoising loop of our own, CogVideoX. Got "
            f"{family.name}, which runs through its stock pipeline. Leave that out, or name another model."
        )


def _refuse_call(recipe: Recipe, family: Family) -> None:
    if recipe.call:
        raise UsageError(
            f"A recipe must have no call for {family.name}: our own loop runs it. Got {', '.join(recipe.call)}. "
            "Leave it out."
        )


def half_open(span: range) -> str:
    """[start, stop) as text."""
    return f"[{span.start}, {span.stop})"


def _number(value: float | Auto, auto: float) -> float:
    return auto if value == "auto" else value


def _window(recipe: Recipe, steps: int, size: Size) -> Window | None:
    if not recipe.edits:
        return None
    if len(recipe.edits) > 1:
        raise UsageError(f"A recipe must have one transfer from previous_segment. Got {len(recipe.edits)}. Join them.")
    edit, auto = recipe.edits[0], Window.scaled(steps, size.layers)
    window = Window(
        auto.steps if edit.steps == "auto" else _span(edit.steps, steps, "edits.0.steps", "steps"),
        auto.layers if edit.layers == "auto" else _span(edit.layers, size.layers, "edits.0.layers", "layers"),
    )
    return window if window.steps and window.layers else None


def _span(bounds: tuple[int, int] | Auto, n: int, name: str, what: str) -> range:
    if bounds == "auto":
        return range(n)
    if bounds[1] > n:
        raise UsageError(f"{name} must lie within [0, {n}), the {what} of this run. Got {list(bounds)}. Lower its end.")
    return range(*bounds)


def _call_defaults(family: Family) -> dict[str, Any]:
    """The arguments of the stock pipeline's call that have a default."""
    import diffusers

    arguments = inspect.signature(getattr(diffusers, family.pipelines[0]).__call__).parameters.values()
    return {argument.name: argument.default for argument in arguments if argument.default is not argument.empty}


def _size(family: Family, config: Mapping[str, Any], call: Mapping[str, Any]) -> Size:
    clip = None
    if family is COGVIDEOX:
        frames = clip_frames(config)
        refuse_frames(frames, config.get("patch_size_t"))
        values = config["in_channels"] * config["sample_height"] * config["sample_width"]
        clip = Clip(frames, config.get("temporal_compression_ratio", 4), values)
    layers = sum(config.get(name) or 0 for name in ("num_layers", "num_single_layers"))
    heads, width = config["num_attention_heads"], config["attention_head_dim"]
    return Size(family, layers, heads, width, family.clip(config, call), clip)
