"""A recipe: plain data that says what to generate, what to change in the attention, and what to keep. No torch.

Every field has a default or is asked for; "auto" means the model's or the method's own rule, resolved in `recipes.job`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from probe.word import places_of, words_of

Auto = Literal["auto"]


def _not_empty(text: str) -> str:
    if not text.strip():
        raise ValueError("must have at least one word")
    return text


def _half_open(bounds: tuple[int, int]) -> tuple[int, int]:
    if not 0 <= bounds[0] < bounds[1]:
        raise ValueError("must be [start, stop) with 0 <= start < stop")
    return bounds


Text = Annotated[str, AfterValidator(_not_empty)]
HalfOpen = Annotated[tuple[int, int], AfterValidator(_half_open)]


class Part(BaseModel):
    """Common rules: unknown keys are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


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
    seed: int = Field(default=0, ge=0, lt=2**63)


class Segments(Part):
    """DiTCtrl: a longer latent, cut into overlapping segments that each show one prompt or a mix of two."""

    transitions: int = Field(default=2, ge=0, description="interpolated segments between two prompts")
    overlap: Annotated[int, Field(ge=0)] | Auto = Field(
        default="auto", description="latent frames shared with the next"
    )


class Transfer(Part):
    """Rows of the batch read tensors of a source row: with kv, DiTCtrl's KV sharing."""

    kind: Literal["transfer"]
    tensors: Literal["k", "v", "kv", "q", "qk", "qkv"] = "kv"
    source: Literal["previous_segment"]
    steps: HalfOpen | Auto = Field(default="auto", description="half-open; auto: [round(K/25), round(K/2)) of K steps")
    layers: HalfOpen | Auto = Field(
        default="auto", description="half-open; auto: the last max(1, round(L/6)) of L layers"
    )


Look = Literal["frames", "tokens", "entropy", "lse", "columns", "sinks", "sparsity", "locality"]
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
    heads: Literal["mean", "each"] = "mean"
    mass: bool = Field(default=True, description="region masses as well")
    readouts: list[Look] = Field(default_factory=list, description="further readouts, each once")
    keep_qk: list[Place] | Auto = Field(
        default_factory=list, description="[step, layer] pairs whose Q and K are kept; auto: one, in the middle"
    )


class Output(Part):
    """The video files."""

    fps: int = Field(default=8, ge=1, le=120)


class Recipe(Part):
    """One run."""

    schema_version: Literal[1]
    name: Annotated[str, Field(pattern=r"^\w[\w .-]*$", description="also part of the run folder's name")]
    description: str = ""
    model: Text = Field(default="miniature", description="miniature, a pipeline folder or a hub id")
    prompts: list[Text] = Field(min_length=1)
    sampler: Sampler = Sampler()
    segments: Segments | None = None
    edits: list[Transfer] = []
    record: Record | None = None
    call: dict[str, Any] = Field(
        default_factory=dict,
        description="further arguments of the pipeline's call (height, num_frames, ...), for models that run through "
        "their stock pipeline",
    )
    output: Output = Output()

    @model_validator(mode="after")
    def _fits(self) -> Recipe:
        if self.segments is None and len(self.prompts) > 1:
            raise ValueError(f"must have one prompt without segments, got {len(self.prompts)}; add segments to turn")
        if self.segments is None and any(edit.source == "previous_segment" for edit in self.edits):
            raise ValueError("must have segments for a transfer from previous_segment")
        for word in self.record.words if self.record else ():
            if not any(places_of(prompt, word) for prompt in self.prompts):
                spoken = ", ".join(dict.fromkeys(w for prompt in self.prompts for w in words_of(prompt)))
                raise ValueError(f"must record words of its prompts. Got {word!r}. The words are: {spoken}")
        return self
