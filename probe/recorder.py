"""Record: readouts of a run into a run folder, one file per step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from probe import film
from probe.clock import step_of
from probe.errors import UsageError
from probe.gather import gather, refuse_unrecordable, tokens_of
from probe.models.family import asked
from probe.models.registry import family_of
from probe.provenance import provenance, where_from
from probe.readout.base import Readout
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

    Raises:
        UsageError: readouts that cannot share a record; see `probe.gather.refuse_unrecordable`.
    """

    def __init__(
        self,
        writer: RunWriter,
        prompts: Sequence[Prompt],
        readouts: Sequence[Readout] = (),
        start_frame: Callable[[Branch], int] = lambda branch: 0,
    ) -> None:
        refuse_unrecordable(readouts)
        self.writer, self.prompts, self.readouts, self.start_frame = writer, prompts, tuple(readouts), start_frame

    def write(self, step: int, attrs: Mapping[str, Any], resume: Mapping[str, Any] | None = None) -> None:
        """Write `steps/step_<step>.h5`; readouts that recorded nothing in this step leave it without segments.

        Raises:
            UsageError: two branches of one segment and role, or readouts that look at different layers.
        """
        branches = dict.fromkeys(at.branch for readout in self.readouts for at in readout.at(step=step))
        places = {(branch.segment, branch.role) for branch in branches}
        if len(places) < len(branches):
            raise UsageError(
                f"A record must see one branch of a segment and role. Got {', '.join(map(str, branches))}. Choose one "
                "by where=Where(branches=...), or trace without a record."
            )
        segments = [self._segment(step, branch) for branch in branches]
        self.writer.write_step(step, {"step": step, **attrs}, segments, resume)
        for readout in self.readouts:
            for at in readout.at(step=step):
                del readout.values[at]

    def _segment(self, step: int, branch: Branch) -> SegmentRecord:
        layout = max((r.layouts[branch] for r in self.readouts if branch in r.layouts), key=lambda seen: seen.text)
        return SegmentRecord(
            segment=branch.segment,
            role=branch.role,
            attrs={
                **asdict(branch),
                "start_frame": self.start_frame(branch),
                "grid": list(layout.grid.shape),
                "order": layout.order,
            },
            tokens=tokens_of(self.prompts, branch, layout.text),
            **gather(self.readouts, step, branch),
        )


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
    refuse_unrecordable(readouts)
    _refuse_several(pipe, prompt, call)
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
        began: dict[int, float] = {}  # the timestep of each step's first evaluation

        def on_step(_: Any, evaluation: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            step = step_of(pipe.scheduler, evaluation)
            assert step is not None
            began.setdefault(step, float(timestep))
            if evaluation + 1 < len(pipe.scheduler.timesteps) and step_of(pipe.scheduler, evaluation + 1) == step:
                return tensors  # a second-order sampler goes on with this step
            resume = {"latents": tensors["latents"].float().cpu().numpy(), "generator": generator.get_state().numpy()}
            recorder.write(step, {"timestep": began[step], **source}, resume)
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


def _refuse_several(pipe: Any, prompt: Any, call: Mapping[str, Any]) -> None:
    """A record is of one video."""
    family = family_of(pipe.transformer)
    if not isinstance(prompt, str) or family.copies(call) > 1:
        got = f"{family.several}={family.copies(call)}" if isinstance(prompt, str) else repr(prompt)
        raise UsageError(
            f"record() must make one video or picture of one prompt, given as text. Got {got}. Record each in a run of "
            "its own."
        )


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
