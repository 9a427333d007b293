"""Record: readouts of a run into a run folder, one file per step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from probe.clock import step_of
from probe.errors import MmditError, UsageError
from probe.film import Frames
from probe.gather import gather, refuse_unrecordable, tokens_of
from probe.models.family import asked
from probe.models.registry import family_of
from probe.plan import Handler
from probe.provenance import provenance, where_from
from probe.readout.base import Readout
from probe.readout.mass import RegionMass
from probe.readout.word import WordMaps
from probe.show import MAIN, Clip, Show, finish_video
from probe.site import JOINT, Branch, Span, Where
from probe.store import Run, RunWriter, SegmentRecord
from probe.tracer import trace
from probe.word import Prompt


class Recorder:
    """Moves what readouts collected for a step into a step file, and forgets it.

    A readout says where its values lie in a step file (`Readout.stored`); of every readout the numbers per head
    (`Readout.metrics`) are kept. `start_frame(branch)` is the first latent frame of a branch's segment in the long
    video. Where a run has several prompts and no segments, each prompt is a segment by its number.

    Raises:
        UsageError: readouts that cannot share a record; see `probe.gather.refuse_unrecordable`.
    """

    def __init__(
        self,
        writer: RunWriter,
        prompts: Sequence[Prompt],
        readouts: Sequence[Readout] = (),
        start_frame: Callable[[Branch], int] | None = None,
    ) -> None:
        refuse_unrecordable(readouts)
        self.writer, self.prompts, self.readouts = writer, prompts, tuple(readouts)
        self.segmented, self.start_frame = start_frame is not None, start_frame or (lambda branch: 0)

    def write(self, step: int, attrs: Mapping[str, Any], resume: Mapping[str, Any] | None = None) -> None:
        """Write `steps/step_<step>.h5`; readouts that recorded nothing in this step leave it without segments.

        Raises:
            UsageError: two branches of one segment and role, or readouts that look at different layers.
        """
        branches = dict.fromkeys(at.branch for readout in self.readouts for at in readout.at(step=step))
        places = {(self._number(branch), branch.role) for branch in branches}
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
            segment=self._number(branch),
            role=branch.role,
            attrs={
                **asdict(branch),
                "segment": self._number(branch),
                "start_frame": self.start_frame(branch),
                "grid": list(layout.grid.shape),
                "order": layout.order,
            },
            tokens=tokens_of(self.prompts, branch, layout.text),
            **gather(self.readouts, step, branch),
        )

    def _number(self, branch: Branch) -> int:
        return branch.segment if self.segmented else branch.prompt


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
    if not isinstance(prompt, str):
        raise _one_video(repr(prompt))
    words = (words,) if isinstance(words, str) else words
    where = Where(steps=steps, layers=layers)
    both = family_of(pipe.transformer).kinds & JOINT
    maps = WordMaps(*words, where=where, per_head=per_head, directions=("vt", "tv") if both else ("vt",))
    looks = (maps, RegionMass(where=where), *readouts)
    return generate(pipe, prompt, looks, out, seed=seed, fps=fps, force=force, call=call)


def generate(
    pipe: Any,
    prompts: str | Mapping[str, str],
    readouts: Sequence[Readout],
    out: str | Path,
    *,
    edits: Sequence[Handler] = (),
    seed: int = 0,
    shared: bool = True,
    fps: int = 8,
    force: bool = False,
    recipe: str | None = None,
    info: Mapping[str, Any] | None = None,
    show: Show | None = None,
    quiet: bool = True,
    call: Mapping[str, Any],
) -> Run:
    """`record` with readouts and edits of one's own, of one prompt or of several by name, which make one batch. With
    `shared` all start from the same noise, else each has its own, as the stock pipeline does. `recipe` is the text kept
    as recipe.yaml, `info` are further facts for run.json, `show` says how the videos are written.
    """
    _refuse_own(call, fps)
    refuse_unrecordable(readouts)
    family = family_of(pipe.transformer)
    if family.copies(call) > 1:
        raise _one_video(f"{family.several}={family.copies(call)}")
    named = {MAIN: prompts} if isinstance(prompts, str) else dict(prompts)
    texts = list(named.values())
    traced = trace(pipe, *edits, *readouts)
    cut = traced.tokenize(texts, **call)
    count = int(asked(pipe, call, "num_inference_steps"))
    traced.plan(count, cut)  # refuses first
    facts = {**provenance(pipe), "prompts": texts, "seed": seed, "call": {k: repr(v) for k, v in call.items()}}
    facts |= info or {}
    with (
        RunWriter.create(out, facts, recipe or f"# probe.record({texts[0]!r})\n", force) as writer,
        tqdm(total=count, unit="step", disable=quiet) as bar,
    ):
        generators = [torch.Generator().manual_seed(seed) for _ in range(len(texts) if shared else 1)]
        steps = _Steps(pipe, Recorder(writer, cut, readouts), generators, where_from(facts), bar)
        given = {
            "prompt": texts if len(texts) > 1 else texts[0],
            "generator": generators if len(generators) > 1 else generators[0],
        }
        given |= {"callback_on_step_end": steps.end, "output_type": "np"}
        pixels = _pixels(traced(**given, **call))
        clips = [Clip(name, text, frames) for (name, text), frames in zip(named.items(), pixels, strict=True)]
        finish_video(writer.folder, clips, show or Show(fps))
        writer.finish("done", computed=dict(traced.computed))
    return Run(writer.folder)


def refuse_overflow(latents: torch.Tensor, step: int, steps: int) -> None:
    """Nothing, if the latents after a step are finite.

    Raises:
        MmditError: they are not.
    """
    if not torch.isfinite(latents).all():
        raise MmditError(
            f"Latents must be finite numbers after every step. Got NaN or infinity after step {step} of {steps}, which "
            "is not kept. Weaken the edits or the guidance."
        )


class _Steps:
    """Writes each step of a stock pipeline when its callback tells that it ended."""

    def __init__(
        self, pipe: Any, recorder: Recorder, generators: Sequence[torch.Generator], source: Mapping[str, Any], bar: Any
    ) -> None:
        self.pipe, self.recorder, self.generators, self.source, self.bar = pipe, recorder, generators, source, bar
        self.began: dict[int, float] = {}  # the timestep of each step's first evaluation

    def end(self, _: Any, evaluation: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """The pipeline's `callback_on_step_end`."""
        scheduler = self.pipe.scheduler
        step = step_of(scheduler, evaluation)
        assert step is not None
        self.began.setdefault(step, float(timestep))
        if evaluation + 1 < len(scheduler.timesteps) and step_of(scheduler, evaluation + 1) == step:
            return tensors  # a second-order sampler goes on with this step
        refuse_overflow(tensors["latents"], step, int(self.bar.total))
        drawn = np.stack([generator.get_state().numpy() for generator in self.generators])
        kept = {
            "latents": tensors["latents"].float().cpu().numpy(),
            "generator": drawn[0] if len(drawn) == 1 else drawn,
        }
        self.recorder.write(step, {"timestep": self.began[step], **self.source}, kept)
        self.bar.update()
        return tensors


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


def _one_video(got: str) -> UsageError:
    return UsageError(
        f"record() must make one video or picture of one prompt, given as text. Got {got}. Record each in a run of its "
        "own."
    )


def _pixels(output: Any) -> list[Frames]:
    """Frames uint8 [F, height, width, 3] of each video of a pipeline's output; a picture is one frame."""
    videos = output.frames if hasattr(output, "frames") else [picture[None] for picture in output.images]
    return [(np.asarray(frames) * 255).round().astype(np.uint8) for frames in videos]
