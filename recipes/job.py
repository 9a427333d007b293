"""A recipe with every "auto" resolved for the model it is for: numbers only, before any weight is loaded."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from control.schedule import dynamic_guidance, refuse_steps
from ditctrl.segment import Segments
from ditctrl.sharing import Chunks, Window
from probe.errors import UsageError
from probe.models.family import Family
from probe.models.load import card, checkpoints_of
from probe.show import MAIN
from probe.site import Branch, Where, unperturbed
from recipes.cut import Cut, cut_of
from recipes.given import Given, given_of
from recipes.language.part import Auto
from recipes.language.recipe import Recipe
from recipes.size import Size, call_defaults, pixels_of, size_of
from recipes.story import range_of, segments_of, window_of


@dataclass(frozen=True)
class Job:
    """A recipe and its numbers. `segments`, `window` and `cut` are None where the recipe has none; `chunks` says how
    segments are spread over forwards; `given` is the video that is edited, if there is one. Where the segments are
    isolated clips, `connected` are those that they are compared with: a clip starts from the noise of its prompt's
    first segment there (SV:450-531).
    """

    recipe: Recipe
    size: Size
    steps: int
    guidance: float
    segments: Segments | None
    window: Window | None
    cut: Cut | None = None
    chunks: Chunks = field(default_factory=Chunks)
    connected: Segments | None = None
    given: Given | None = None

    @property
    def first_step(self) -> int:
        """The first step that is made; later than 0 where a given video is edited."""
        return self.given.step if self.given else 0

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
        clip = self.size.clip
        if clip is None:
            return None
        if self.connected is not None:
            return self.connected.prompts * clip.pixel_frames(clip.frames)
        return clip.pixel_frames(self.frames)

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
            "video": str(self.given) if self.given else None,
        }

    def record_where(self) -> Where:
        """The calls that are recorded."""
        record = self.recipe.record
        if record is None:
            return Where(steps=(), layers=())
        return Where(
            steps=_span(record.steps, self.steps, "record.steps", "steps"),
            layers=_span(record.layers, self.size.layers, "record.layers", "layers"),
            branches=unperturbed,
        )

    def region_where(self) -> Where:
        """The calls whose region maps are recorded: the recorded ones in their middle step, or in other steps."""
        record, where = self.recipe.record, self.record_where()
        if record is None:
            return where
        if record.region_steps != "auto":
            return replace(where, steps=_span(record.region_steps, self.steps, "record.region_steps", "steps"))
        recorded = _span(record.steps, self.steps, "record.steps", "steps")
        return replace(where, steps=(recorded[len(recorded) // 2],))

    def region_frame(self) -> int | None:
        """The token frame of the spatial map; None is the middle one."""
        frame = self.recipe.record.region_frame if self.recipe.record else "auto"
        if frame == "auto":
            return None
        self.size.layout.frame_slice(frame)  # refuses one that is not there
        return frame


def prepare(recipe: Recipe, chunks: Chunks | None = None) -> Job:
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
        segments, connected = segments_of(recipe, size.clip)
        if segments is None and chunks not in (None, Chunks()):
            raise UsageError(
                "Segments per batch must be those of a story. Got a recipe without segments. Leave the option out."
            )
        window, cut = window_of(recipe, steps, size.layers), cut_of(recipe, size.clip.frames)
        job = Job(recipe, size, steps, guidance, segments, window, cut, chunks or Chunks(), connected)
        refuse_steps(job.steps)
        if recipe.video is not None:
            shape = pixels_of(checkpoint.model, config, size.clip)
            job = replace(job, given=given_of(recipe.video, recipe.prompt_names, shape, steps))
    job.region_where()
    job.region_frame()
    return job


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
        "video": recipe.video is not None,
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


def _span(bounds: tuple[int, int] | Auto, n: int, name: str, what: str) -> range:
    """A half-open interval."""
    return range(n) if bounds == "auto" else range_of(bounds, n, name, what)
