"""What the probe needs to know of a model family, as data."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from probe.layout import TokenLayout
from probe.models.rope import Rope
from probe.word import Encoder


@dataclass(frozen=True)
class Attention:
    """Where the attention modules of one kind are: attribute `module` of every block in the list `blocks` of the model
    (None in a block that has none); `kind` is one of probe.site.KINDS.
    """

    blocks: str
    module: str
    kind: str


@dataclass(frozen=True)
class Slot:
    """One attention module of a model: its layer (block, counted through all lists of blocks), which attention of that
    block it is, and its kind.
    """

    layer: int
    call: int
    kind: str
    module: Any


@dataclass(frozen=True)
class Text:
    """Text tokens of one encoder: the pipeline's tokenizer by name, how many (None: `max_sequence_length` of the
    call), the arguments of the call that may give it another prompt, whether a pipeline without that encoder gives
    zeros, that is padding, and how the pipeline cleans a prompt.
    """

    tokenizer: str = "tokenizer"
    length: int | None = None
    prompts: tuple[str, ...] = ("prompt",)
    optional: bool = False
    clean: Callable[[str], str] = str

    def encoder(self, pipe: Any, length: int) -> Encoder:
        """As `probe.word.tokenize` wants it."""
        encoder = getattr(pipe, self.tokenizer.replace("tokenizer", "text_encoder"), None)
        missing = self.optional and encoder is None
        return Encoder(None if missing else getattr(pipe, self.tokenizer, None), length, clean=self.clean)


@dataclass(frozen=True)
class Family:
    """One model family.

    `transformer` is the diffusers class name; `attentions` say where the attention modules are. `layout(model, inputs)`
    reads the joint sequence from a forward's own arguments, `clip(config, call)` predicts it from the configuration and
    the pipeline call's arguments, `text` says how the pipeline makes text tokens. `frame_axis` is the axis of frames of
    `hidden_states`, None where there is one picture. `several` is the argument that asks for several videos of a
    prompt, empty where the pipeline ignores it. `ragged`: one attention call per batch entry, each with its own text
    length. `text_modulates`: the text also changes every row's modulation. `rope(model, inputs)` is how a forward
    rotates queries and keys, None where it does not. `streams` are the arguments of a block that it also returns, in
    that order; `feed_forwards` are the modules of that name in each list of blocks: one for the video and one for the
    text, or one for all rows; in single-stream blocks the projection that takes attention and feed-forward side by
    side. `probe_inputs(model)` makes small random inputs for a self-check.
    """

    name: str
    transformer: str
    pipelines: tuple[str, ...]
    attentions: tuple[Attention, ...]
    layout: Callable[[Any, dict[str, Any]], TokenLayout]
    clip: Callable[[Mapping[str, Any], Mapping[str, Any]], TokenLayout]
    probe_inputs: Callable[[Any], dict[str, Any]]
    text: tuple[Text, ...] = (Text(),)
    several: str = "num_videos_per_prompt"
    frame_axis: int | None = 2
    ragged: bool = False
    text_modulates: bool = False
    rope: Callable[[Any, dict[str, Any]], Rope | None] = lambda model, inputs: None
    streams: tuple[str, ...] = ("hidden_states", "encoder_hidden_states")
    feed_forwards: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    call_defaults: Callable[[Any], dict[str, Any]] = lambda pipe: {}

    @property
    def kinds(self) -> frozenset[str]:
        """The kinds of attention a model of this family has."""
        return frozenset(attention.kind for attention in self.attentions)

    def blocks(self, model: nn.Module) -> list[tuple[str, Any]]:
        """The blocks in model order, each with the name of its list; the nth is layer n."""
        lists = dict.fromkeys(attention.blocks for attention in self.attentions)
        return [(name, block) for name in lists for block in getattr(model, name)]

    def slots(self, model: nn.Module) -> list[Slot]:
        """The attention modules in model order."""
        found, first = [], {}
        for attention in self.attentions:
            blocks = getattr(model, attention.blocks)
            start = first.setdefault(attention.blocks, sum(len(getattr(model, name)) for name in first))
            for index, block in enumerate(blocks):
                module = getattr(block, attention.module, None)
                if module is not None:
                    call = sum(slot.layer == start + index for slot in found)
                    found.append(Slot(start + index, call, attention.kind, module))
        return sorted(found, key=lambda slot: (slot.layer, slot.call))

    def inputs(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a model forward by name."""
        names = list(inspect.signature(type(model).forward).parameters)[1:]
        return dict(zip(names, args, strict=False)) | kwargs

    def texts(self, texts: Sequence[str], call: Mapping[str, Any]) -> Sequence[str]:
        """What the text encoders are given, `texts` or the call's own `prompt_2`, `prompt_3`; nothing if they differ:
        no word then has one place.
        """
        given = [call.get(name) or texts for text in self.text for name in text.prompts]
        said = [[one] if isinstance(one, str) else list(one) for one in given]
        return said[0] if all(one == said[0] for one in said) else ()

    def copies(self, call: Mapping[str, Any]) -> int:
        """Videos of each prompt that a call asks for."""
        return int(call.get(self.several) or 1)

    def encoders(self, pipe: Any, call: Mapping[str, Any]) -> list[Encoder]:
        """The text encoders of a pipeline call, for `probe.word.tokenize`."""
        return [text.encoder(pipe, text.length or asked(pipe, call, "max_sequence_length")) for text in self.text]


def transformers_of(pipe: Any) -> list[Any]:
    """The transformers of a pipeline: one, or two of which one works at a time (Wan 2.2)."""
    both = (pipe.transformer, getattr(pipe, "transformer_2", None))
    return [model for model in both if model is not None]


def asked(pipe: Any, call: Mapping[str, Any], name: str) -> Any:
    """An argument of a pipeline's call as it is given, or its default."""
    given = {**getattr(pipe, "defaults", {}), **call}
    return given[name] if name in given else _signature(pipe).parameters[name].default


def arguments_of(pipe: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a pipeline's call by name, positional ones included; as they are if they do not fit."""
    try:
        bound = _signature(pipe).bind_partial(pipe, *args, **kwargs).arguments
    except TypeError:  # the pipeline itself will say so
        return dict(kwargs)
    return {name: value for name, value in bound.items() if value is not pipe}


def _signature(pipe: Any) -> inspect.Signature:
    """That of the stock call, below the class that fills in defaults."""
    stock = next(base for base in type(pipe).__mro__ if "defaults" not in vars(base))
    return inspect.signature(stock.__call__)
