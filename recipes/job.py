"""A recipe with every "auto" resolved for the model it is for: numbers only, before any weight is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from control.schedule import dynamic_guidance, refuse_steps
from ditctrl.duration import lasting
from ditctrl.segment import Segments
from ditctrl.sharing import Window
from probe.errors import UsageError
from probe.models.family import Family
from probe.models.load import card, checkpoints_of
from probe.show import MAIN
from probe.site import Branch, Where
from probe.store_record import ROLES
from recipes.cut import Cut, cut_of
from recipes.language.operator import Transfer
from recipes.language.part import Auto
from recipes.language.recipe import Recipe
from recipes.language.source import PREVIOUS
from recipes.language.span import Span, chosen
from recipes.size import Clip, Size, call_defaults, size_of


@dataclass(frozen=True)
class Job:
    """A recipe and its numbers. `segments`, `window` and `cut` are None where the recipe has none."""

    recipe: Recipe
    size: Size
    steps: int
    guidance: float
    segments: Segments | None
    window: Window | None
    cut: Cut | None = None

    @property
    def frames(self) -> int:
        """Latent frames of the video; token frames where the stock pipeline makes it."""
        clip, longer = self.size.clip, self.segments or self.cut
        return longer.frames if longer else clip.frames if clip else self.size.layout.grid.frames

    @property
    def joined(self) -> bool:
        """Whether all prompts make one video together."""
        return self.segments is not None or self.cut is not None

    def start_frame(self, branch: Branch) -> int:
        """The first latent frame of a branch in the video."""
        if self.cut is not None:
            return self.cut.starts[branch.segment]
        return branch.segment * self.segments.stride if self.segments else 0

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
            "windows begin at": list(self.cut.starts) if self.cut else None,
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
            branches=Unperturbed(),
        )


@dataclass(frozen=True)
class Unperturbed:
    """Conditional branches outside of perturbed passes: those that a record shows."""

    def __call__(self, branch: Branch) -> bool:
        return branch.guided and branch.role in ROLES


def prepare(recipe: Recipe) -> Job:
    """Resolve a recipe against its model's configuration.

    Raises:
        ModelError: the model is not there or of an unknown family.
        UsageError: numbers that do not fit it (overlap, windows), or more than its stock pipeline can do.
    """
    _refuse_names(recipe)
    checkpoint = checkpoints_of(recipe.model)[0]
    family, config = checkpoint.family, checkpoint.config()
    defaults = call_defaults(family) | card(checkpoint.model)
    steps = int(_number(recipe.sampler.steps, defaults["num_inference_steps"]))
    guidance = float(_number(recipe.sampler.guidance, defaults["guidance_scale"]))
    size = size_of(family, config, defaults | recipe.call)
    if size.clip is None:
        _refuse_more_than_stock(recipe, family)
        job = Job(recipe, size, steps, guidance, None, None)
    else:
        _refuse_call(recipe, family)
        segments, cut = _segments(recipe, size.clip), cut_of(recipe, size.clip.frames)
        job = Job(recipe, size, steps, guidance, segments, _window(recipe, steps, size), cut)
        refuse_steps(job.steps)
    job.record_where()
    return job


def _segments(recipe: Recipe, clip: Clip) -> Segments | None:
    if recipe.segments is None:
        return None
    overlap = None if recipe.segments.overlap == "auto" else recipe.segments.overlap
    for name, given in (("guides", recipe.guides), ("latents", recipe.latents)):
        if given:
            raise UsageError(
                f"A recipe with segments must have no {name}: the segments share one long latent. Got {len(given)}. "
                "Leave one of the two out."
            )
    asked = recipe.segments
    made = Segments.scaled(len(recipe.prompts), clip.frames, asked.transitions, overlap).middle(asked.middle)
    if asked.durations is None:
        return made
    unit = recipe.output.fps if asked.unit == "seconds" else 1
    return lasting(made, [duration * unit / clip.compression for duration in asked.durations])


def _refuse_names(recipe: Recipe) -> None:
    """Videos are named like their prompts, beside the files of the run."""
    if MAIN in recipe.prompt_names and len(recipe.prompts) > 1:
        raise UsageError(f"A prompt must not be named {MAIN}, as the file of the run is. Got it. Choose another name.")


def _refuse_more_than_stock(recipe: Recipe, family: Family) -> None:
    sampler = recipe.sampler
    asked = {
        "segments": recipe.segments is not None,
        "windows": recipe.windows is not None,
        "guides": bool(recipe.guides),
        "latents": bool(recipe.latents),
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
    """Where segments share; None without sharing, or where its window is empty."""
    shared = [
        (number, edit)
        for number, edit in enumerate(recipe.edits)
        if isinstance(edit, Transfer) and edit.source == PREVIOUS
    ]
    if not shared:
        return None
    if len(shared) > 1:
        raise UsageError(f"A recipe must have one transfer from previous_segment. Got {len(shared)}. Join them.")
    number, edit = shared[0]
    auto = Window.scaled(steps, size.layers)
    window = Window(
        auto.steps if edit.steps == "auto" else _range(edit.steps, steps, f"edits.{number}.steps", "steps"),
        auto.layers if edit.layers == "auto" else _range(edit.layers, size.layers, f"edits.{number}.layers", "layers"),
    )
    return window if window.steps and window.layers else None


def _range(span: Span, n: int, name: str, what: str) -> range:
    """A span without gaps."""
    found = chosen(span, n, name, what)
    if found[-1] - found[0] >= len(found):
        raise UsageError(f"{name} must be one range for previous_segment. Got {list(found)}. Write [start, stop).")
    return range(found[0], found[-1] + 1)


def _span(bounds: tuple[int, int] | Auto, n: int, name: str, what: str) -> range:
    """A half-open interval."""
    return range(n) if bounds == "auto" else _range(bounds, n, name, what)
