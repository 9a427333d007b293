"""Record: readouts of a run into a run folder, one file per step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from probe import film
from probe.errors import UsageError
from probe.layout import TokenLayout
from probe.provenance import provenance, where_from
from probe.readout.base import Readout
from probe.readout.mass import RegionMass
from probe.readout.word import WordMaps
from probe.site import Branch, Span, Where
from probe.store import Run, RunWriter, SegmentRecord
from probe.tracer import trace
from probe.word import Prompt


class Recorder:
    """Moves what readouts collected for a step into a step file, and forgets it.

    `start_frame(branch)` is the first latent frame of a branch's segment in the long video.
    """

    def __init__(
        self,
        writer: RunWriter,
        prompts: Sequence[Prompt],
        readouts: Sequence[Readout] = (),
        start_frame: Callable[[Branch], int] = lambda branch: 0,
    ) -> None:
        self.writer, self.prompts, self.readouts, self.start_frame = writer, prompts, tuple(readouts), start_frame
        self.maps = next((r for r in readouts if isinstance(r, WordMaps)), None)
        self.mass = next((r for r in readouts if isinstance(r, RegionMass)), None)

    def write(
        self, step: int, layout: TokenLayout, attrs: Mapping[str, Any], resume: Mapping[str, Any] | None = None
    ) -> None:
        """Write `steps/step_<step>.h5`; readouts that recorded nothing in this step leave it without segments."""
        branches = dict.fromkeys(at.branch for readout in self.readouts for at in readout.at(step=step))
        segments = [self._segment(step, branch, layout) for branch in branches]
        self.writer.write_step(step, {"step": step, **attrs}, segments, resume)
        for readout in self.readouts:
            for at in readout.at(step=step):
                del readout.values[at]

    def _segment(self, step: int, branch: Branch, layout: TokenLayout) -> SegmentRecord:
        prompt = self.prompts[branch.nearest]
        maps, mass = _of(self.maps, step, branch), _of(self.mass, step, branch)
        layers = tuple(sorted(set(maps) | set(mass)))
        if maps and mass and set(maps) != set(mass):
            raise UsageError(
                "Word maps and region mass must be recorded in the same layers. Got different ones. Use one where."
            )
        stacked = {
            direction: np.stack([maps[layer][direction] for layer in layers])
            for direction in (self.maps.directions if self.maps and maps else ())
        }
        return SegmentRecord(
            segment=branch.segment,
            role=branch.role,
            attrs={**asdict(branch), "start_frame": self.start_frame(branch), "grid": list(layout.grid.shape)},
            tokens=_tokens(prompt),
            words=self.maps.words_of[branch] if self.maps and maps else (),
            layers=layers,
            mass=np.stack([mass[layer] for layer in layers]) if mass else None,
            maps=stacked,
            heads="each" if self.maps and self.maps.per_head else "mean",
            word_frames=stacked["vt"].mean((-1, -2)) if "vt" in stacked else None,
        )


def _of(readout: Readout | None, step: int, branch: Branch) -> dict[int, Any]:
    """What a readout collected for one step and branch, by layer; of several evaluations in a step, the first."""
    seen = readout.at(step=step, branch=branch) if readout else []
    return {at.layer: readout.values[at] for at in reversed(seen)} if readout else {}


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
    layers: Span = None,
    steps: Span = None,
    per_head: bool = False,
    seed: int = 0,
    fps: int = 8,
    force: bool = False,
    **call: Any,
) -> Run:
    """Generate `prompt` through the stock pipeline and keep its video, word maps, region masses and provenance in
    folder `out`.

    `words` defaults to every word of the prompt; `layers` and `steps` select what is kept. `call` goes to the pipeline
    (num_inference_steps, guidance_scale, ...). The video is bit-identical to the same call without recording.

    Raises:
        WordError: a word is not in the prompt.
        StoreError: the folder is taken (see `force`) or cannot be written.
    """
    _refuse_own(call, fps)
    words = (words,) if isinstance(words, str) else words
    where = Where(steps=steps, layers=layers)
    maps, mass = WordMaps(*words, where=where, per_head=per_head), RegionMass(where=where)
    traced = trace(pipe, maps, mass)
    prompts = traced.tokenize([prompt], **call)
    count = int(call.get("num_inference_steps", getattr(pipe, "defaults", {}).get("num_inference_steps", 50)))
    traced.plan(count, prompts)  # refuses first
    info = {**provenance(pipe), "prompts": [prompt], "seed": seed, "call": {k: repr(v) for k, v in call.items()}}
    with RunWriter.create(out, info, f"# probe.record({prompt!r})\n", force) as writer:
        recorder = Recorder(writer, prompts, (maps, mass))
        generator = torch.Generator().manual_seed(seed)

        def on_step(_: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            assert traced.layout is not None
            resume = {"latents": tensors["latents"].float().cpu().numpy(), "generator": generator.get_state().numpy()}
            recorder.write(step, traced.layout, {"timestep": int(timestep), **where_from(info)}, resume)
            return tensors

        given = {"generator": generator, "callback_on_step_end": on_step, "output_type": "np"} | call
        frames = (traced(prompt=prompt, **given).frames[0] * 255).round().astype(np.uint8)
        finish_video(writer.folder, frames, fps, prompt)
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


def finish_video(folder: Path, frames: film.Frames, fps: int, title: str) -> None:
    """video.mp4, video.gif and contact.png of a finished run."""
    film.save_video(folder, frames, fps)
    pictures, notes = film.pick(frames, 9)
    film.contact_sheet(
        folder / "contact.png", title, [film.Row(f"{len(frames)} frames, {fps} per second", pictures, notes)]
    )
