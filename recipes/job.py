"""A recipe with every "auto" resolved for the model it is for: numbers only, before any weight is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from control.schedule import dynamic_guidance, refuse_frames, refuse_steps
from ditctrl.segment import Segments
from ditctrl.sharing import Window
from probe.errors import ModelError, UsageError
from probe.layout import TokenLayout
from probe.models.cogvideox import COGVIDEOX, clip_frames, layout_of
from probe.models.load import card, locate
from probe.site import Where
from recipes.recipe import Auto, Recipe

COGVIDEOX_STEPS, COGVIDEOX_GUIDANCE = 50, 6.0


@dataclass(frozen=True)
class Size:
    """What the configuration of a model says: layers, heads, the joint sequence of one clip, latent frames of a
    clip, values of one latent frame.
    """

    layers: int
    heads: int
    layout: TokenLayout
    clip_frames: int
    compression: int
    latent_values: int


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
        """Latent frames of the video."""
        return self.segments.frames if self.segments else self.size.clip_frames

    @property
    def pixel_frames(self) -> int:
        """Frames of the video."""
        return self.size.compression * (self.frames - 1) + 1

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
        UsageError: numbers that do not fit it: overlap, windows.
    """
    place = locate(recipe.model)
    size, defaults = _size(place), card(place)
    steps = _number(recipe.sampler.steps, defaults.get("num_inference_steps", COGVIDEOX_STEPS))
    guidance = _number(recipe.sampler.guidance, defaults.get("guidance_scale", COGVIDEOX_GUIDANCE))
    segments = None
    if recipe.segments is not None:
        overlap = None if recipe.segments.overlap == "auto" else recipe.segments.overlap
        segments = Segments.scaled(len(recipe.prompts), size.clip_frames, recipe.segments.transitions, overlap)
    job = Job(recipe, size, int(steps), float(guidance), segments, _window(recipe, int(steps), size))
    refuse_steps(job.steps)
    job.record_where()
    return job


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


def _size(place: str) -> Size:
    """From the transformer's configuration alone."""
    from diffusers import CogVideoXTransformer3DModel

    try:
        config: Any = CogVideoXTransformer3DModel.load_config(place, subfolder="transformer")
    except Exception as error:  # diffusers and the hub raise what they like
        cause = " ".join(str(error).split())[:200]
        raise ModelError(
            f"A model's configuration must be readable. Got {place}: {type(error).__name__}: {cause}. Check the id or "
            "folder."
        ) from error
    if config.get("_class_name") != COGVIDEOX.transformer:
        raise ModelError(
            f"A recipe's model must be a CogVideoX. Got {config.get('_class_name', 'no class name')} in {place}. "
            f"Known: {COGVIDEOX.transformer}."
        )
    frames = clip_frames(config)
    refuse_frames(frames, config.get("patch_size_t"))
    size = frames, config["sample_height"], config["sample_width"]
    layout = layout_of(config, *size, config["max_text_seq_length"])
    compression = config.get("temporal_compression_ratio", 4)
    values = config["in_channels"] * config["sample_height"] * config["sample_width"]
    return Size(config["num_layers"], config["num_attention_heads"], layout, frames, compression, values)
