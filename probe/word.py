"""From words of a prompt to token positions, by the tokenizer. Nobody counts tokens by hand.

Names: a *word* is in the prompt, a *token* (or piece) in the sequence. No torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from probe.errors import UsageError, WordError

_WORD = re.compile(r"\w+(?:['’-]\w+)*")
_NTH = re.compile(r"^(?P<phrase>.+?)#(?P<nth>[1-9]\d*)$")


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model's text encoder sees it: `len(ids)` tokens, right-padded.

    `spans[i]` are the characters token i covers, half-open; special tokens and padding cover none.
    """

    text: str
    pieces: tuple[str, ...]
    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    padding: tuple[bool, ...]

    @property
    def words(self) -> tuple[str, ...]:
        """The words of the prompt in order, repetitions included."""
        return words_of(self.text)

    def word_of_token(self) -> tuple[int, ...]:
        """For each token the index of its word in `words`, or -1."""
        bounds = [match.span() for match in _WORD.finditer(self.text)]
        return tuple(next((i for i, word in enumerate(bounds) if _overlap(span, word)), -1) for span in self.spans)

    def tokens_of(self, phrase: str) -> tuple[int, ...]:
        """Token positions of a word or of consecutive words, wherever they stand in the prompt.

        "circle" is every circle, "circle#2" the second one, "red circle" the phrase. Case does not matter.

        Raises:
            WordError: the phrase is not in the prompt, or was cut off by the token limit; lists the words.
        """
        found = places_of(self.text, phrase)
        tokens = tuple(i for i, span in enumerate(self.spans) if any(_overlap(span, place) for place in found))
        if not found:
            raise WordError(
                f"A word must be in its prompt. Got {phrase!r} for {self.text!r}. Its words are: "
                f"{', '.join(self.words)}."
            )
        if not tokens:
            raise WordError(
                f"A word must lie within the first {len(self.ids)} tokens. Got {phrase!r}, which the model cuts off. "
                "Shorten the prompt."
            )
        return tokens

    @classmethod
    def blank(cls, length: int) -> Prompt:
        """What the unconditional half shows: no word, all padding."""
        return cls("", ("",) * length, (0,) * length, ((0, 0),) * length, (True,) * length)

    def first(self, count: int) -> Prompt:
        """The first `count` tokens, where a model leaves out the padding behind them."""
        cut = {name: getattr(self, name)[:count] for name in ("pieces", "ids", "spans", "padding")}
        return self if count >= len(self.ids) else replace(self, **cut)

    def has(self, phrase: str) -> bool:
        """Whether `tokens_of(phrase)` would find something."""
        try:
            return bool(self.tokens_of(phrase))
        except WordError:
            return False


def words_of(text: str) -> tuple[str, ...]:
    """The words of a text in order, repetitions included."""
    return tuple(match.group() for match in _WORD.finditer(text))


def places_of(text: str, phrase: str) -> list[tuple[int, int]]:
    """Where a word or consecutive words stand in a text, as half-open character spans; see `Prompt.tokens_of`."""
    nth = _NTH.match(phrase.strip())
    wanted = nth["phrase"] if nth else phrase.strip()
    pattern = r"\s+".join(re.escape(part) for part in wanted.split())
    found = [m.span() for m in re.finditer(rf"(?<!\w){pattern}(?!\w)", text, re.IGNORECASE)] if pattern else []
    return found[int(nth["nth"]) - 1 : int(nth["nth"])] if nth else found


def _overlap(a: tuple[int, int], b: tuple[int, int]) -> bool:
    return a[0] < b[1] and b[0] < a[1]


@dataclass(frozen=True)
class Encoder:
    """One text encoder of a pipeline: its tokenizer (None: not loaded, its tokens are all padding), how many tokens it
    gives the model, a template around the prompt whose first `crop` tokens the pipeline drops, and how the pipeline
    cleans a prompt first.
    """

    tokenizer: Any
    length: int
    template: str = "{}"
    crop: int = 0
    clean: Callable[[str], str] = str


def tokenize(encoders: Sequence[Encoder], texts: Sequence[str]) -> tuple[Prompt, ...]:
    """The prompts as a pipeline's encoders cut them, one encoder's tokens after the other's.

    Raises:
        UsageError: a prompt is empty, or a tokenizer cannot tell which characters a token covers.
    """
    return tuple(_joined([_prompt(encoder, text) for encoder in encoders]) for text in texts)


def _joined(parts: Sequence[Prompt]) -> Prompt:
    names = ("pieces", "ids", "spans", "padding")
    return replace(parts[0], **{name: tuple(x for part in parts for x in getattr(part, name)) for name in names})


def _prompt(encoder: Encoder, text: str) -> Prompt:
    if not text.strip():
        raise UsageError("A prompt must have at least one word. Got an empty one. Describe the video in a few words.")
    text = encoder.clean(text)
    tokenizer, count = encoder.tokenizer, encoder.length
    if tokenizer is None:
        return Prompt(text, ("",) * count, (-1,) * count, ((0, 0),) * count, (True,) * count)
    if not getattr(tokenizer, "is_fast", False):
        raise UsageError(
            f"Words need a fast tokenizer (one that maps tokens to characters). Got {type(tokenizer).__name__}. Load "
            "the pipeline with its fast tokenizer."
        )
    before = encoder.template.index("{}")
    coded = tokenizer(
        encoder.template.replace("{}", text),
        padding="max_length",
        max_length=count + encoder.crop,
        truncation=True,
        return_offsets_mapping=True,
    )
    ids, offsets, seen = (coded[name][encoder.crop :] for name in ("input_ids", "offset_mapping", "attention_mask"))
    spans = (_inside(int(a) - before, int(b) - before, len(text)) for a, b in offsets)
    pieces = tuple(tokenizer.convert_ids_to_tokens(ids))
    return Prompt(text, pieces, tuple(ids), tuple(spans), tuple(not one for one in seen))


def _inside(start: int, stop: int, length: int) -> tuple[int, int]:
    """A span within the text; what lies in the template around it covers nothing."""
    start, stop = max(start, 0), min(stop, length)
    return (start, stop) if start < stop else (0, 0)
