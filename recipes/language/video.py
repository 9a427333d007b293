"""A given video as a recipe names it. No torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from recipes.language.part import Count, Part, PromptName, Text

INPUT = "video.input"
"""How the file is called in the folder of a run, before its ending; no prompt can have this name."""


class Video(Part):
    """A given video: inverted under its prompt to a noisy step, from which all prompts start."""

    file: Text = Field(description="mp4, GIF or what else ffmpeg reads; in the recipe's folder, or anywhere with --set")
    sha256: str | None = Field(default=None, description="of the file; null: not looked at; a run keeps it")
    prompt: PromptName | None = Field(default=None, description="name of the prompt that tells it; null: the first")
    start: Annotated[float, Field(ge=0, le=0.9)] = Field(
        default=0.3,
        description="share of the steps, of the noisiest, that is left out, at least one; the larger, the nearer all "
        "prompts stay to the video",
    )
    follow: bool = Field(default=True, description="its prompt is put back to the video's own latents after every step")
    fit: Literal["refuse", "resize"] = Field(
        default="refuse",
        description="of another size or longer; resize: scaled, then cut at the edges and after the frames needed",
    )
    first: int = Field(default=0, ge=0, description="pixel frame of the file that comes first")
    every: Count = Field(default=1, description="takes one pixel frame in so many")
    iterations: Annotated[int, Field(ge=1, le=1000)] = Field(
        default=1,
        description="of each step, at most; 1: plain DDIM inversion; 20: nearly exact, for a start below 0.3, but "
        "edits keep less of the layout",
    )

    @property
    def beside(self) -> str:
        """The name of the file in the folder of a run."""
        _, dot, ending = self.file.rpartition(".")
        return f"{INPUT}{dot}{ending.lower()}"
