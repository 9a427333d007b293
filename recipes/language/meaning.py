"""Whether a recipe means something: the prompts, masks and words it names are there. No model, no torch."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from pydantic_core import PydanticCustomError

from probe.word import places_of, words_of
from recipes.language.area import AREA, PLAIN, WordMask, Words
from recipes.language.guide import Blend, Guide
from recipes.language.operator import Extend, Operation, Rotate, Shift, Transfer
from recipes.language.part import PROMPT
from recipes.language.source import PREVIOUS, Itself, Stored
from recipes.language.walk import Path, marked_names, parts

if TYPE_CHECKING:
    from recipes.language.recipe import Recipe

SOFT = ("gate", "masks")
"""Keys that take soft masks."""


def refuse(recipe: Recipe) -> None:
    """Nothing, for a recipe that means something.

    Raises:
        PydanticCustomError: type "meaning"; its context has the path, what must hold, what came and what to do.
    """
    _Check(recipe).run()


def needs(recipe: Recipe) -> tuple[str, ...]:
    """What a recipe needs of a model, as far as it alone can tell, some of "loop" (a denoising loop of our own), "RoPE"
    and "two prompts".
    """
    sampler = recipe.sampler
    plain = type(sampler)(steps=sampler.steps, guidance=sampler.guidance, seed=sampler.seed, noise=sampler.noise)
    moved = (part for _, part in parts(recipe, Rotate | Transfer))
    told = {
        "loop": bool(
            recipe.segments or recipe.windows or recipe.guides or recipe.latents or recipe.video or sampler != plain
        ),
        "RoPE": any(isinstance(part, Rotate) or part.positions == "target" for part in moved),
        "two prompts": len(recipe.texts) > 1,
    }
    return tuple(name for name, needed in told.items() if needed)


@dataclass(frozen=True)
class _Check:
    recipe: Recipe

    def run(self) -> None:
        recipe = self.recipe
        if recipe.include is not None:
            _fail(("include",), "must be resolved", recipe.include, "Load the recipe from its file.")
        for name, value in recipe.variables.items():
            if "${" in repr(value):
                _fail(("variables", name), "must not refer to another variable", value, "Write its value.")
        if PREVIOUS in recipe.prompt_names:
            _fail(("prompts", PREVIOUS), "must have a name of its own", PREVIOUS, "Rename it.")
        for name in recipe.masks:
            if name in PLAIN:
                _fail(("masks", name), "must have a name of its own", name, f"These areas are there: {_list(PLAIN)}.")
        self._names()
        self._words()
        self._sources()
        for path, words in parts(recipe.latents, Words, ("latents",)):
            _fail(path, "must be an area of the video", _list(words.phrases), "Name a mask of the words.")
        self._recorded()
        self._given()
        self._windowed()

    def _names(self) -> None:
        """Every prompt and mask that is named is there."""
        prompts = self.recipe.prompt_names
        for path, name in marked_names(self.recipe, PROMPT):
            if name != PREVIOUS and name not in prompts:
                _fail(path, "must name a prompt", name, _nearest(name, prompts, "The prompts are"))
            if name == PREVIOUS and self.recipe.segments is None:
                _fail(path, "must not be previous_segment without segments", name, "Add segments, or name a prompt.")
        masks = (*PLAIN, *self.recipe.masks)
        for path, name in marked_names(self.recipe, AREA):
            if name not in masks:
                _fail(path, "must name an area or a mask", name, _nearest(name, masks, "There are"))
            mask = self.recipe.masks.get(name)
            if isinstance(mask, WordMask) and mask.soft and not set(SOFT) & set(path):
                _fail(path, "must be a mask with an edge", name, "A soft mask can be a gate. Or leave out soft: true.")

    def _words(self) -> None:
        """Every word is in every prompt where it is looked up."""
        for name, mask in self.recipe.masks.items():
            if isinstance(mask, WordMask):
                path, names = ("masks", name), self.recipe.prompt_names
                longer = self.recipe.segments or self.recipe.windows
                if mask.prompt is not None and longer is not None:
                    must = "must be found in each segment itself, without a prompt"
                    _fail((*path, "prompt"), must, mask.prompt, "Leave it out.")
                asked = names if longer else (mask.prompt or names[0],)
                self._refuse_absent(path, (*mask.phrases, *mask.rivals), asked)
        for path, edit, prompts in self._edits():
            for inner, words in parts(edit, Words, path):
                if edit.guidance == "unconditional" and not words.both_halves:
                    must = "must be no words for the unconditional half, which shows none"
                    _fail(inner, must, _list(words.phrases), "Write guidance: conditional.")
                asked = prompts
                if isinstance(edit, Extend) and isinstance(edit.source, str) and inner[len(path)] == "columns":
                    asked = [edit.source]
                self._refuse_absent(inner, words.phrases, asked)

        for path, edit in parts(self.recipe, Transfer):
            if edit.objects is not None:
                self._objects((*path, "objects"), edit)

    def _objects(self, path: Path, edit: Transfer) -> None:
        """How the prompts call an object: each phrase is in its prompt."""
        names, given = self.recipe.prompt_names, edit.objects
        turns = max(1, len(names) - 1)
        each = [given] * len(names) if isinstance(given, str) else given or []
        paired = [one for one in each if not isinstance(one, str)]
        if paired and edit.source != PREVIOUS:
            _fail(path, "must be one phrase for each prompt", given, "Pairs are for the turns between segments.")
        if (paired and len(paired) < len(each)) or len(each) != (turns if paired else len(names)):
            must = f"must be one phrase, one for each of {len(names)} prompts, or one pair for each of {turns} turns"
            _fail(path, must, given, "Name the object in each.")
        for number, one in enumerate(each):
            for name, phrase in zip(names[number:], [one] if isinstance(one, str) else one, strict=False):
                self._refuse_absent(path, (phrase,), [name])

    def _refuse_absent(self, path: Path, phrases: Collection[str], prompts: Collection[str]) -> None:
        for name in prompts:
            text = self.recipe.texts[self.recipe.prompt_index(name)] if name in self.recipe.prompt_names else ""
            for phrase in phrases:
                if text and not places_of(text, phrase):
                    hint = _nearest(phrase, words_of(text), "Its words are")
                    more = " Or say which prompts are meant." if len(prompts) > 1 else ""
                    _fail(path, f"must have words of prompt {name}", phrase, hint + more)

    def _sources(self) -> None:
        """A prompt that takes from itself would change nothing; only a perturbed pass differs from its plain one."""
        for path, edit, prompts in self._edits():
            moved = isinstance(edit, Transfer) and edit.mapping is not None
            if isinstance(edit, Transfer) and not moved:
                self._refuse_own(path, edit, prompts)
            if isinstance(edit, Transfer | Extend) and not moved and path[0] != "guides":
                self._refuse_itself(path, edit, prompts)
            if isinstance(edit, Shift) and edit.direction.source == edit.direction.target:
                place = (*path, "direction", "to")
                _fail(place, "must be another prompt than from", edit.direction.target, "Name another prompt.")
        for number, edit in enumerate(self.recipe.latents):
            if isinstance(edit, Blend):
                self._refuse_itself(("latents", number), edit, edit.prompts or self.recipe.prompt_names)

    def _refuse_itself(self, path: Path, edit: Transfer | Extend | Blend, prompts: Collection[str]) -> None:
        if edit.prompts == [edit.source]:
            hint = "Name the prompts that take from it."
            _fail((*path, "prompts"), "must not be the source itself", edit.source, hint)
        if all(name == edit.source for name in prompts) and self.recipe.segments is None:
            must, hint = "must not be the only prompt that is changed", "Add a prompt that takes from it."
            _fail((*path, "source"), must, edit.source, hint)

    def _refuse_own(self, path: Path, edit: Transfer, prompts: Collection[str]) -> None:
        place = (*path, "source")
        if isinstance(edit.source, Itself):
            _fail(place, "must be with a mapping", "itself", "Add a mapping, or leave the transfer out.")
        at = edit.source.stored if isinstance(edit.source, Stored) else None
        if at and (at.step, at.layer) == (None, None) and all(name == (at.prompt or name) for name in prompts):
            must = "must name a step, a layer or another prompt, or be with a mapping"
            _fail(place, must, "stored", "Name the step that is kept.")

    def _recorded(self) -> None:
        record = self.recipe.record
        for i, word in enumerate(record.words if record else ()):
            if not any(places_of(text, word) for text in self.recipe.texts):
                spoken = tuple(dict.fromkeys(w for text in self.recipe.texts for w in words_of(text)))
                _fail(("record", "words", i), "must be a word of its prompts", word, f"The words are: {_list(spoken)}.")
        for i, name in enumerate(record.masks if record else ()):
            if not isinstance(self.recipe.masks.get(name), WordMask):
                words = [key for key, mask in self.recipe.masks.items() if isinstance(mask, WordMask)]
                _fail(("record", "masks", i), "must name a mask of words", name, _nearest(name, words, "There are"))
        together = len(self.recipe.texts) > 1 and not (self.recipe.segments or self.recipe.windows)
        if record and "similarity" in record.readouts and not together:
            hint = "Name another prompt, or leave it out."
            _fail(("record", "readouts"), "must have several prompts side by side to compare", "similarity", hint)

    def _windowed(self) -> None:
        """Windows are one video: no two of them show the same frames of two prompts."""
        if self.recipe.windows is None:
            return
        if self.recipe.segments is not None:
            _fail(("windows",), "must be without segments", "both", "Leave one of the two out.")
        for path, name in marked_names(self.recipe, PROMPT):
            if path[-1] in ("source", "from", "to"):
                _fail(path, "must not be another prompt in a recipe with windows", name, "Leave the windows out.")

    def _given(self) -> None:
        """A given video is one clip, and starts from its own noise, which only DDIM keeps."""
        recipe = self.recipe
        if recipe.video is None:
            return
        for name, longer in (("segments", recipe.segments), ("windows", recipe.windows)):
            if longer is not None:
                _fail(("video",), f"must be without {name}", "both", "Leave one of the two out.")
        if recipe.sampler.scheduler != "ddim":
            must, got = "must be ddim with a video, which no other inverts", recipe.sampler.scheduler
            _fail(("sampler", "scheduler"), must, got, "Write sampler: {scheduler: ddim}.")
        for number, edit in enumerate(recipe.latents):
            if not isinstance(edit, Blend):
                must = "must be a blend with a video, which does not start from new noise"
                _fail(("latents", number, "op"), must, edit.op, "Leave it out, or the video.")

    def _edits(self) -> Iterator[tuple[Path, Operation, Collection[str]]]:
        """The operators, and the prompts they act on: their own, or those of what they stand in."""
        found = list(parts(self.recipe, Operation | Guide))
        for path, edit in found:
            around = [one.prompts for place, one in found if place == path[: len(place)] and one.prompts]
            if isinstance(edit, Operation):
                yield path, edit, around[-1] if around else self.recipe.prompt_names


def _nearest(name: str, known: Collection[str], there: str) -> str:
    near = difflib.get_close_matches(name, known, 1)
    return f"Did you mean {near[0]}?" if near else f"{there}: {_list(known)}."


def _list(names: Collection[str]) -> str:
    return ", ".join(names)


def _fail(path: Path, must: str, got: object, hint: str) -> NoReturn:
    place = ".".join(map(str, path))
    raise PydanticCustomError(
        "meaning", "{place} {must}. Got {got}. {hint}",
        {"path": path, "place": place, "must": must, "got": repr(got), "hint": hint},
    )  # fmt: skip
