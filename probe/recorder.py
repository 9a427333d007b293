"""Record: readouts of a run into a run folder, one file per step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from probe import film
from probe.errors import UsageError
from probe.models.family import asked
from probe.models.registry import family_of
from probe.provenance import provenance, where_from
from probe.readout.base import At, Readout
from probe.readout.mass import RegionMass
from probe.readout.word import WordMaps
from probe.site import JOINT, Branch, Span, Where
from probe.store import Run, RunWriter, SegmentRecord
from probe.tracer import trace
from probe.word import Prompt


class Recorder:
    """Moves what readouts collected for a step into a step file, and forgets it.

    A readout says where its values lie in a step file (`Readout.stored`); of every readout the numbers per head
    (`Readout.metrics`) are kept. `start_frame(branch)` is the first latent frame of a
    branch's segment in the long video.
    """

    def __init__(
        self,
        writer: RunWriter,
        prompts: Sequence[Prompt],
        readouts: Sequence[Readout] = (),
        start_frame: Callable[[Branch], int] = lambda branch: 0,
    ) -> None:
        self.writer, self.prompts, self.readouts, self.start_frame = writer, prompts, tuple(readouts), start_frame

    def write(self, step: int, attrs: Mapping[str, Any], resume: Mapping[str, Any] | None = None) -> None:
        """Write `steps/step_<step>.h5`; readouts that recorded nothing in this step leave it without segments."""
        branches = dict.fromkeys(at.branch for readout in self.readouts for at in readout.at(step=step))
        segments = [self._segment(step, branch) for branch in branches]
        self.writer.write_step(step, {"step": step, **attrs}, segments, resume)
        for readout in self.readouts:
            for at in readout.at(step=step):
                del readout.values[at]

    def _segment(self, step: int, branch: Branch) -> SegmentRecord:
        layout = max((r.layouts[branch] for r in self.readouts if branch in r.layouts), key=lambda seen: seen.text)
        seen = {readout: _of(readout, step, branch) for readout in self.readouts}
        stacked = {readout: found for readout, found in seen.items() if found and readout.stored != "qk"}
        layers = _common(stacked)
        metrics = _metrics(stacked, layers)
        tables: dict[str, Any] = {
            readout.stored: np.stack([readout.table(found[layer][1]) for layer in layers])
            for readout, found in stacked.items()
            if readout.stored in ("mass", "frames", "columns", "token_mass")
        }
        return SegmentRecord(
            segment=branch.segment,
            role=branch.role,
            attrs={
                **asdict(branch),
                "start_frame": self.start_frame(branch),
                "grid": list(layout.grid.shape),
                "order": layout.order,
            },
            tokens=_tokens(self.prompts[branch.nearest].first(layout.text)),
            layers=tuple(layers),
            kinds=tuple(layers.values()),
            metrics=metrics,
            metric_info={n: text for readout in stacked for n, text in readout.definitions.items() if n in metrics},
            qk=_kept(seen),
            **_maps(stacked, branch, layers),
            **tables,
        )


Found = Mapping[int, tuple[At, Any]]


def _of(readout: Readout, step: int, branch: Branch) -> Found:
    """What a readout collected for one step and branch, by layer; of several evaluations in a step, the first."""
    return {at.layer: (at, readout.values[at]) for at in reversed(readout.at(step=step, branch=branch))}


def _common(stacked: Mapping[Readout, Found]) -> dict[int, str]:
    """The recorded layers and their kinds of attention, in order.

    Raises:
        UsageError: readouts that share a file look at different layers.
    """
    if len({frozenset(found) for found in stacked.values()}) > 1:
        raise UsageError(
            "Readouts of one run must be recorded in the same layers. Got different ones: "
            f"{', '.join(str(readout) for readout in stacked)}. Give them one where."
        )
    found = next(iter(stacked.values()), {})
    return {layer: found[layer][0].kind for layer in sorted(found)}


def _metrics(stacked: Mapping[Readout, Found], layers: Iterable[int]) -> dict[str, NDArray[np.float32]]:
    """Numbers per layer and head [L, H] by name; readouts that share a name measure the same."""
    tables: dict[str, NDArray[np.float32]] = {}
    for readout, found in stacked.items():
        rows = [readout.metrics(found[layer][1]) for layer in layers]
        tables = {name: np.stack([row[name] for row in rows]) for name in rows[0]} | tables
    return tables


def _kept(seen: Mapping[Readout, Found]) -> dict[int, tuple[Any, Any]]:
    """Kept query and key by layer."""
    kept = (found for readout, found in seen.items() if readout.stored == "qk")
    return {layer: (value["q"], value["k"]) for found in kept for layer, (_, value) in found.items()}


def _maps(stacked: Mapping[Readout, Found], branch: Branch, layers: Iterable[int]) -> dict[str, Any]:
    """Word maps by direction, their words, and what each frame gives to each word."""
    for readout, found in stacked.items():
        if isinstance(readout, WordMaps):
            maps = {d: np.stack([found[layer][1][d] for layer in layers]) for d in readout.directions}
            return {
                "words": readout.words_of[branch],
                "maps": maps,
                "heads": "each" if readout.per_head else "mean",
                "word_frames": maps["vt"].mean((-1, -2)) if "vt" in maps else None,
            }
    return {"words": ()}


def _tokens(prompt: Prompt) -> dict[str, Any]:
    return {
        "text": np.array(prompt.pieces),
        "id": np.array(prompt.ids),
        "word": np.array(prompt.word_of_token()),
        "is_pad": np.array(prompt.padding),
    }


def record(
    pipe: Any,
    prompt: str,
    words: str | Sequence[str] = (),
    out: str | Path = "runs/record",
    *,
    readouts: Sequence[Readout] = (),
    layers: Span = None,
    steps: Span = None,
    per_head: bool = False,
    seed: int = 0,
    fps: int = 8,
    force: bool = False,
    **call: Any,
) -> Run:
    """Generate `prompt` through the stock pipeline of any family and keep its video or picture, word maps, region
    masses and provenance in folder `out`.

    `words` defaults to every word of the prompt; `layers` and `steps` select what is kept; `readouts` are recorded as
    well. `call` goes to the pipeline (num_inference_steps, guidance_scale, height, ...). The output is bit-identical to
    the same call without recording.

    Raises:
        WordError: a word is not in the prompt.
        PlanError: a readout needs a kind of attention this model does not have.
        StoreError: the folder is taken (see `force`) or cannot be written.
    """
    words = (words,) if isinstance(words, str) else words
    where = Where(steps=steps, layers=layers)
    both = family_of(pipe.transformer).kinds & JOINT
    maps = WordMaps(*words, where=where, per_head=per_head, directions=("vt", "tv") if both else ("vt",))
    looks = (maps, RegionMass(where=where), *readouts)
    return generate(pipe, prompt, looks, out, seed=seed, fps=fps, force=force, call=call)


def generate(
    pipe: Any,
    prompt: str,
    readouts: Sequence[Readout],
    out: str | Path,
    *,
    seed: int = 0,
    fps: int = 8,
    force: bool = False,
    recipe: str | None = None,
    quiet: bool = True,
    call: Mapping[str, Any],
) -> Run:
    """`record` with readouts of one's own; `recipe` is the text kept as recipe.yaml."""
    _refuse_own(call, fps)
    traced = trace(pipe, *readouts)
    prompts = traced.tokenize([prompt], **call)
    count = int(asked(pipe, call, "num_inference_steps"))
    traced.plan(count, prompts)  # refuses first
    info = {**provenance(pipe), "prompts": [prompt], "seed": seed, "call": {k: repr(v) for k, v in call.items()}}
    source = where_from(info)
    with (
        RunWriter.create(out, info, recipe or f"# probe.record({prompt!r})\n", force) as writer,
        tqdm(total=count, unit="step", disable=quiet) as bar,
    ):
        recorder = Recorder(writer, prompts, readouts)
        generator = torch.Generator().manual_seed(seed)

        def on_step(_: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            resume = {"latents": tensors["latents"].float().cpu().numpy(), "generator": generator.get_state().numpy()}
            recorder.write(step, {"timestep": float(timestep), **source}, resume)
            bar.update()
            return tensors

        given = {"generator": generator, "callback_on_step_end": on_step, "output_type": "np"} | dict(call)
        finish_video(writer.folder, _pixels(traced(prompt=prompt, **given)), fps, prompt)
    return Run(writer.folder)


_OWN = ("generator", "callback_on_step_end", "callback_on_step_end_tensor_inputs", "output_type", "return_dict")


def _refuse_own(call: Mapping[str, Any], fps: int) -> None:
    """What record() itself needs of the pipeline's call."""
    taken = [name for name in _OWN if name in call]
    if taken:
        raise UsageError(
            f"record() must set {', '.join(_OWN)} itself. Got {', '.join(taken)}. Use seed=..., or probe.trace for a "
            "call of your own."
        )
    if fps < 1:
        raise UsageError(f"fps must be at least 1. Got {fps}. Take 8.")


def _pixels(output: Any) -> film.Frames:
    """Frames uint8 [F, height, width, 3] of a pipeline's output; a picture is one frame."""
    frames = output.frames[0] if hasattr(output, "frames") else output.images[:1]
    return (np.asarray(frames) * 255).round().astype(np.uint8)


def finish_video(folder: Path, frames: film.Frames, fps: int, title: str) -> None:
    """video.mp4, video.gif and contact.png of a finished run."""
    film.save_video(folder, frames, fps)
    pictures, notes = film.pick(frames, 9)
    said = f"{len(frames)} frames, {fps} per second" if len(frames) > 1 else "one picture"
    film.contact_sheet(folder / "contact.png", title, [film.Row(said, pictures, notes)])
