"""A recipe: plain data that says what to generate, what to change in the attention, and what to keep. No torch.

Every field has a default or is asked for; "auto" means the model's or the method's own rule, resolved in `recipes.job`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, Tag, model_validator

from recipes.language import meaning
from recipes.language.area import Mask
from recipes.language.guide import Guide, LatentEdit
from recipes.language.operator import Edit
from recipes.language.part import Auto, Count, HalfOpen, Name, Part, PromptName, Text, by_form
from recipes.language.timed import without_times
from recipes.language.video import Video


class Sampler(Part):
    """How the latent is denoised."""

    scheduler: Literal["model", "ddim", "dpm"] = Field(
        default="model",
        description="model: the pipeline's own; ddim; dpm: SDE-DPM-Solver++ 2M as CogVideoX implements it",
    )
    steps: Annotated[int, Field(ge=1)] | Auto = Field(default="auto", description="denoising steps; must divide 1000")
    guidance: Annotated[float, Field(ge=1, allow_inf_nan=False)] | Auto = Field(
        default="auto", description="scale of classifier-free guidance, or its peak when dynamic; auto: the model's own"
    )
    dynamic: bool = Field(default=False, description="CogVideoX's dynamic guidance, between 1 and 1 + guidance")
    negative: Literal["empty", "zeros"] = Field(
        default="empty", description="unconditional embedding: the encoded empty prompt, or zeros as in DiTCtrl"
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="of the first noise")
    noise: Literal["shared", "each"] = Field(
        default="shared", description="shared: all prompts start from the same noise; each: from noise of their own"
    )


class Segments(Part):
    """DiTCtrl: a longer latent, cut into overlapping segments that each show one prompt or a mix of two."""

    variant: Literal["code", "paper"] = Field(
        default="code", description="which is followed where the authors' code and paper differ"
    )
    transitions: Annotated[int, Field(ge=0)] | Auto = Field(
        default="auto", description="interpolated segments between two prompts; auto: 2, of the paper 1"
    )
    overlap: Annotated[int, Field(ge=0)] | Auto = Field(
        default="auto", description="latent frames shared with the next"
    )
    middle: int = Field(default=0, ge=0, description="further segments of every prompt but the first and the last")
    times: Annotated[int, Field(ge=2)] | None = Field(
        default=None, description="of a single prompt: as if it stood so often among the prompts"
    )
    isolated: bool = Field(
        default=False, description="a clip of each prompt by itself, one after the other: what DiTCtrl is compared with"
    )
    durations: list[Annotated[float, Field(gt=0, allow_inf_nan=False)]] | None = Field(
        default=None,
        description='how long each prompt is shown, rounded to whole segments; or begin prompts with "[0:00-0:03]"',
    )
    unit: Literal["seconds", "frames"] = Field(default="seconds", description="of durations, at the frames per second")

    @model_validator(mode="after")
    def _one_length(self) -> Segments:
        if sum(map(bool, (self.middle, self.durations, self.times, self.isolated))) > 1:
            raise ValueError("must have one of middle, times, durations and isolated")
        return self


class Windows(Part):
    """A longer latent in overlapping windows, predicted side by side and averaged where they overlap (Gen-L-Video)."""

    frames: Count = Field(description="latent frames of the video; a window has those of a clip")
    stride: Count | Auto = Field(
        default="auto", description="latent frames from one window to the next; auto: a quarter of a window"
    )
    weights: Literal["uniform", "triangular"] = Field(
        default="triangular", description="of the frames of a window in the average; triangular: the middle counts most"
    )
    prompts: list[PromptName] | None = Field(
        default=None, min_length=1, description="name of the prompt of each window; null: all prompts, in equal shares"
    )


Look = Literal[
    "frames",
    "tokens",
    "entropy",
    "lse",
    "columns",
    "sinks",
    "sparsity",
    "locality",
    "similarity",
    "settling",
    "text_text",
    "spatial",
    "temporal",
]
Place = tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]]


class Record(Part):
    """What is kept of the attention, per step."""

    words: list[Text] = Field(
        default_factory=list, description="words of the prompts; none means every word, of a long prompt the first 16"
    )
    directions: list[Literal["vt", "tv"]] = Field(
        default=["vt", "tv"], min_length=1, description="vt: video looks at the word; tv: back (not in Wan)"
    )
    layers: HalfOpen | Auto = Field(default="auto", description="half-open; auto: all")
    steps: HalfOpen | Auto = Field(default="auto", description="half-open; auto: all")
    heads: Literal["mean", "each"] = Field(default="mean", description="mean: maps over all heads; each: per head")
    mass: bool = Field(default=True, description="region masses as well")
    readouts: list[Look] = Field(default_factory=list, description="further readouts, each once")
    region_steps: HalfOpen | Auto = Field(
        default="auto", description="half-open; of text_text, spatial and temporal; auto: the middle one"
    )
    region_frame: Annotated[int, Field(ge=0)] | Auto = Field(
        default="auto", description="token frame of the spatial map; auto: the middle one"
    )
    masks: list[Name] = Field(
        default_factory=list, description="word masks that are found and kept though no edit may use them"
    )
    keep_qk: list[Place] | Auto = Field(
        default_factory=list, description="[step, layer] pairs whose Q and K are kept; auto: one, in the middle"
    )


class Output(Part):
    """The video files."""

    fps: int = Field(default=8, ge=1, le=120, description="frames per second")
    show: list[PromptName] | None = Field(
        default=None, min_length=1, description="names of the prompts whose videos are written; null: the last"
    )


Prompts = Annotated[
    Annotated[list[Text], Field(min_length=1), Tag("list")]
    | Annotated[dict[Name, Text], Field(min_length=1), Tag("dict")],
    by_form("must be a list of texts, or texts by name", {list: "list", tuple: "list", dict: "dict"}, {}),
]


class Recipe(Part):
    """One run."""

    schema_version: Literal[1] = Field(description="of this language")
    name: Annotated[str, Field(pattern=r"^\w[\w .-]*$", description="also part of the run folder's name")]
    description: str = Field(default="", description="one line")
    source: str = Field(default="", description="the paper and its arXiv id")
    status: Literal["checked", "runs", "primitives only"] | None = Field(
        default=None,
        description="checked: its effect was measured; runs: it does what its operators say; primitives only: the "
        "paper leaves out what it would take",
    )
    defaults_from: list[str] = Field(default_factory=list, description="where its numbers come from")
    departures: list[str] = Field(default_factory=list, description="where it differs from the paper or its code")
    checked: str = Field(default="", description="what was measured, where status is checked")
    include: str | list[str] | None = Field(
        default=None,
        description="a built-in recipe or a file in this folder that this one starts from: mappings are merged, all "
        "else is replaced; of several, later ones lie on top",
    )
    variables: dict[Name, Any] = Field(
        default_factory=dict, description="values for ${name} anywhere else; --set name=value changes them"
    )
    model: Text = Field(default="miniature", description="miniature, a pipeline folder or a hub id")
    prompts: Prompts = Field(description="texts, or texts by name; those of a list are named 0, 1 and so on")
    sampler: Sampler = Sampler()
    masks: dict[Name, Mask] = Field(default_factory=dict, description="sets of video tokens by name, for areas")
    segments: Segments | None = Field(default=None, description="one prompt after the other in a longer video")
    windows: Windows | None = Field(default=None, description="a longer video in overlapping windows")
    video: Video | None = Field(default=None, description="a given video that is edited, by DDIM inversion")
    edits: list[Edit] = Field(default_factory=list, description="operators, changes of the attention")
    guides: list[Guide] = Field(default_factory=list, description="guidance by perturbed passes")
    latents: list[LatentEdit] = Field(default_factory=list, description="changes of the latents")
    record: Record | None = Field(default=None, description="what is kept of the attention; null: nothing")
    call: dict[str, Any] = Field(
        default_factory=dict,
        description="further arguments of the pipeline's call (height, num_frames, ...), for models that run through "
        "their stock pipeline",
    )
    output: Output = Output()

    @property
    def prompt_names(self) -> tuple[str, ...]:
        """The names of the prompts, in order."""
        if isinstance(self.prompts, dict):
            return tuple(self.prompts)
        return tuple(str(i) for i in range(len(self.prompts)))

    @property
    def texts(self) -> tuple[str, ...]:
        """The prompts, in order."""
        return tuple(self.prompts.values() if isinstance(self.prompts, dict) else self.prompts)

    def prompt_index(self, name: str) -> int:
        """The place of a prompt among `texts`."""
        return self.prompt_names.index(name)

    @property
    def shown(self) -> tuple[int, ...]:
        """The places of the prompts whose videos are written."""
        names = self.output.show or self.prompt_names[-1:]
        return tuple(self.prompt_index(name) for name in names)

    @model_validator(mode="before")
    @classmethod
    def _timed(cls, given: Any) -> Any:
        """The times before the prompts of segments, as durations."""
        return without_times(given)

    @model_validator(mode="after")
    def _means_something(self) -> Recipe:
        meaning.refuse(self)
        return self
