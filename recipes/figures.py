"""Figures of a run's attention: what is chosen, read, drawn and written. No torch.

Each is a PNG and, under the same name, an NPY with the numbers behind it: probabilities, of word maps the lift.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from probe.errors import StoreError, UsageError
from probe.site import Branch
from probe.store import Run
from recipes.figure import Choice, Kind, Layers, SpatialFigure, TemporalFigure, TextFigure
from recipes.figure_words import TokensFigure

KINDS: dict[str, tuple[type[Kind], str]] = {
    "tokens": (TokensFigure, ""),
    "text": (TextFigure, "text_text"),
    "spatial": (SpatialFigure, "spatial"),
    "temporal": (TemporalFigure, "temporal"),
}
"""Each kind, and the region map it is made of."""

ENDS = 15, 20, 25, 29
"""The layers of 30 up to which the authors of DiTCtrl draw running means."""


@dataclass(frozen=True)
class Figure:
    """One figure: its kind, its name without an ending, its numbers, its picture."""

    what: str
    name: str
    values: NDArray[np.float32]
    picture: Image.Image


def as_the_authors(run: Run, choice: Choice) -> Choice:
    """The choices of DiTCtrl's code (arXiv 2412.18597), scaled to the run: step 25 of 50; means of layers 0 to 15, 20,
    25 and 29 of 30, for their maps are a running mean over layers; the first six words in latent frame 10 of 13; the
    whole text; viridis, and magma for words; every picture from its smallest to its largest value.

    Departures: they draw the first six tokens, of which we have words; their spatial and temporal maps are those of the
    unconditional half, though the text map is of the conditional one. Ours are all conditional.
    """
    steps = int(run.info.get("steps", max(run.steps, default=0) + 1))
    frames = run.segment_attrs(_segment(run, choice))["grid"][0]
    drawn = {"layers": cumulative(run.layers), "step": 25 * steps // 50, "word_frame": 10 * frames // 13}
    return replace(choice, **drawn, words=6, scaling="minmax", padding=True)


def cumulative(recorded: Sequence[int]) -> tuple[Layers, ...]:
    """The recorded layers up to each of `ENDS`, scaled to the depth: the last recorded layer counts as the model's."""
    depth = max(recorded, default=0) + 1
    ends = sorted({end * depth // 30 for end in ENDS})
    return tuple(found for end in ends if (found := tuple(layer for layer in recorded if layer <= end)))


def layers_of(text: str, recorded: Sequence[int]) -> tuple[Layers, ...]:
    """Layers as the command line takes them: "3,5" each by itself, "0-3" the mean of several, "cumulative".

    Raises:
        UsageError: it is none of these.
    """
    if text == "cumulative":
        return cumulative(recorded)
    try:
        spans = [[int(end) for end in item.split("-")] for item in text.split(",")]
        found = tuple(tuple(range(ends[0], ends[-1] + 1)) for ends in spans if len(ends) <= 2)
    except ValueError:
        found = ()
    if not found or not all(found):
        raise UsageError(
            f"Layers must be numbers, spans or cumulative. Got {text!r}. Write 3,5 for two figures, 0-3 for the mean "
            "of four layers."
        )
    return found


def figures(run: Run, choice: Choice) -> list[Figure]:
    """Read and draw what is chosen.

    Raises:
        UsageError: what was chosen was not recorded, or lies outside; says what there is, or how to record it.
    """
    if choice.step is not None:
        run.step_attrs(choice.step)  # says by itself which steps there are
    made = []
    for what, kind in kinds_of(run, choice).items():
        read = [_mean(kind, layers) for layers in choice.layers]
        ends = min(float(values.min()) for values in read), max(float(values.max()) for values in read)
        for layers, values in zip(choice.layers, read, strict=True):
            place = _place(kind, layers)
            notes = [", ".join(place), f"prompt: {_prompt(run, kind.segment)}"]
            name = "_".join([kind.name, *(part.removeprefix("mean of ").replace(" ", "_") for part in place)])
            made.append(Figure(what, name, values, kind.draw(values, notes, ends)))
    return made


def write(made: Sequence[Figure], folder: Path) -> list[dict[str, str]]:
    """Write each figure as PNG and NPY into `folder`; one row per figure of what was written.

    Raises:
        StoreError: the disk refused.
    """
    rows = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for figure in made:
            figure.picture.save(folder / f"{figure.name}.png")
            np.save(folder / f"{figure.name}.npy", figure.values)
            shape = "x".join(str(n) for n in figure.values.shape)
            extremes = f"{figure.values.min():.3g} to {figure.values.max():.3g}"
            rows.append({"figure": figure.name, "shape": shape, "values": extremes})
    except OSError as error:
        raise StoreError(
            f"Figures must be written to disk. Got '{error.strerror or error}' in {folder}. Choose another --out."
        ) from error
    return rows


def kinds_of(run: Run, choice: Choice) -> dict[str, Kind]:
    """The kinds of figures asked for, else all that can be drawn at the chosen step and frame.

    Raises:
        UsageError: one was not recorded, or none can be drawn; says how to record it.
    """
    segment, recorded = _segment(run, choice), recorded_kinds(run, choice)
    there = _steps(run, segment)
    wanted = choice.what or tuple(what for what in recorded if choice.step in (None, *there[what]))
    if choice.what is None and "spatial" in wanted and choice.frame not in (None, run.spatial_frame(segment)):
        wanted = tuple(what for what in wanted if what != "spatial")
    lacking = [what for what in wanted if what not in recorded]
    if lacking or not wanted:
        raise UsageError(
            f"A figure must show what was recorded. Got {', '.join(lacking) or 'nothing to show'} for {run.path}, "
            f"which has {', '.join(recorded) or 'no maps'}. Record it with --set "
            "'record.readouts=[text_text, spatial, temporal]', or run ditctrl-visualize."
        )
    return {what: KINDS[what][0](run, choice, segment, there[what]) for what in wanted}


def recorded_kinds(run: Run, choice: Choice) -> tuple[str, ...]:
    """The kinds of figures that the chosen segment holds in some step."""
    return tuple(what for what, steps in _steps(run, _segment(run, choice)).items() if steps)


def _steps(run: Run, segment: int) -> dict[str, tuple[int, ...]]:
    """The steps that hold what a kind of figure is made of; words are taken to be in every step."""
    maps = run.region_maps(segment)
    found = {what: maps.get(region, ()) for what, (_, region) in KINDS.items()}
    return found | {"tokens": run.steps if run.segment_words(segment) else ()}


def _segment(run: Run, choice: Choice) -> int:
    return run.index.places(choice.segment, None)[0][0]


def _mean(kind: Kind, layers: Layers) -> NDArray[np.float32]:
    parts = [kind.read(layer) for layer in (layers or (None,))]
    return np.stack(parts).mean(0, dtype=np.float64).astype(np.float32)


def _place(kind: Kind, layers: Layers) -> list[str]:
    """Where in the run a figure is from, in words."""
    choice, several = kind.choice, len({number for number, _ in kind.run.segments}) > 1
    if layers is None:
        said = "mean of all layers"
    else:
        said = f"layer {layers[0]}" if len(layers) == 1 else f"mean of layers {layers[0]} to {layers[-1]}"
    steps = kind.steps if choice.step is None else (choice.step,)
    when = f"step {steps[0]}" if len(steps) == 1 else f"mean of {len(steps)} steps"
    head = [] if choice.head is None else [f"head {choice.head}"]
    return [*([f"segment {kind.segment}"] if several else []), said, when, *head]


def _prompt(run: Run, segment: int) -> str:
    """The prompt that a segment shows, the nearer one of two that are mixed."""
    said = run.segment_attrs(segment)
    return run.info["prompts"][Branch(prompt=said["prompt"], mix=said["mix"]).nearest]
