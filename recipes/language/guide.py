"""What a recipe does beside the attention: guidance by a perturbed pass, and changes of the latents. No torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from recipes.language.area import Area
from recipes.language.operator import Edit
from recipes.language.part import Count, Name, Number, Part, PromptName
from recipes.language.span import Span, Strength


class Guide(Part):
    """Away from what the model predicts under a perturbation: eps + weight (eps_conditional - eps_perturbed)."""

    name: Name = Field(default="perturbed", description="the pass; guides of one name share it")
    weight: Strength = Field(description="0: no further pass; or a ramp over the steps")
    steps: Span = Field(default=None, description="steps that are guided; null: all")
    prompts: list[PromptName] | None = Field(
        default=None, min_length=1, description="names of the prompts guided; null: all"
    )
    perturb: list[Edit] = Field(min_length=1, description="operators that act in the perturbed pass alone")


class Blend(Part):
    """After a step, what lies outside of the masks is taken from the source (prompt-to-prompt, KV-Edit)."""

    op: Literal["blend"] = "blend"
    source: PromptName = Field(description="name of the prompt that gives the outside")
    prompts: list[PromptName] | None = Field(
        default=None, min_length=1, description="names of the prompts that are changed; null: all others"
    )
    masks: list[Area] = Field(min_length=1, description="what the target keeps: inside of any of these")
    steps: Span = Field(default=None, description="null: all")


class Nudge(Part):
    """The first latents times a factor (Stable Flow: 1.15 before a real image is edited)."""

    op: Literal["nudge"] = "nudge"
    factor: Annotated[Number, Field(gt=0)] = Field(default=1.15, description="1: as they were")


class Shuffle(Part):
    """Frames beyond a window start from the noise of earlier ones, in another order (FreeNoise)."""

    op: Literal["shuffle"] = "shuffle"
    window: Count = Field(default=16, description="latent frames with noise of their own")
    stride: Count = Field(default=4, description="latent frames that are shuffled together")
    seed: int = Field(default=0, ge=0, lt=2**63, description="of the order")

    @model_validator(mode="after")
    def _fits(self) -> Shuffle:
        if self.stride > self.window:
            raise ValueError("must have stride <= window")
        return self


class Renew(Part):
    """The run again from its own slow part with fresh noise for what is fine (FreeInit)."""

    op: Literal["renew"] = "renew"
    times: Count = Field(default=1, description="how many times the run is repeated")
    step: Count = Field(default=1, description="where the repeated run starts")
    time: Annotated[Number, Field(gt=0)] = Field(default=0.25, description="cutoff over frames; 1: highest frequency")
    space: Annotated[Number, Field(gt=0)] = Field(default=0.25, description="cutoff over rows and columns")
    shape: Literal["gaussian", "butterworth"] = Field(default="gaussian", description="of the filter")
    order: Count = Field(default=4, description="of a butterworth filter")


LatentEdit = Annotated[Blend | Nudge | Shuffle | Renew, Field(discriminator="op")]
"""A change of the latents."""
