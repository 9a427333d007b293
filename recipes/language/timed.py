"""Prompts that say when they are shown. No torch."""

from __future__ import annotations

from typing import Any

from pydantic_core import PydanticCustomError

from ditctrl.duration import timed
from probe.errors import UsageError
from recipes.language.part import Part


def without_times(given: Any) -> Any:
    """A recipe with segments whose prompts begin with times, "[0:00-0:03] a red circle", with durations in their place;
    any other as it is.

    Raises:
        PydanticCustomError: type "meaning", as of `recipes.language.meaning`.
    """
    segments, prompts = (given.get(key) if isinstance(given, dict) else None for key in ("segments", "prompts"))
    texts = list(prompts.values()) if isinstance(prompts, dict) else prompts
    if not isinstance(segments, dict | Part) or not isinstance(texts, list):
        return given
    if not all(isinstance(text, str) for text in texts):
        return given
    kept = segments if isinstance(segments, dict) else segments.model_dump()
    try:
        plain, seconds = timed(texts)
        if seconds is not None and kept.get("durations") is not None:
            raise UsageError("Prompts with times must have no durations beside them. Got both. Leave one of them out.")
    except UsageError as error:
        raise PydanticCustomError("meaning", "{said}", {"path": ("prompts",), "said": str(error)}) from error
    if seconds is None:
        return given
    named = dict(zip(prompts, plain, strict=True)) if isinstance(prompts, dict) else plain
    return {**given, "prompts": named, "segments": {**kept, "durations": seconds, "unit": "seconds"}}
