"""A model proves itself: its layout is right, every attention call is seen once, nothing changes unasked, and every
edit counts.

`mmdit check` runs this on load. Each finding that fails says in its own sentence what is wrong.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from probe import attend
from probe.call import AttentionCall
from probe.clock import Clock
from probe.errors import MmditError, ProofError
from probe.layout import TokenLayout
from probe.models.family import transformers_of
from probe.models.load import Bare
from probe.models.registry import family_of
from probe.plan import Handler, Stage
from probe.site import Branch, Where
from probe.tap import Tap
from probe.tracer import Traced

Observe = Callable[[AttentionCall], None]


@dataclass(eq=False)
class _Look(Handler):
    """A readout that needs the log-sum-exp: recording takes the kernel's other form."""

    where: Where = field(default_factory=Where)
    stage = Stage.USED
    needs_lse = True

    def serve(self, call: AttentionCall, rows: tuple[int, ...]) -> None:
        if not torch.isfinite(call.lse()).all():
            raise ProofError(f"A log-sum-exp must be finite. Got another at {call.site}. Check the checkpoint for NaN.")


@dataclass(eq=False)
class _Double(Handler):
    """An edit: v twice as large."""

    where: Where = field(default_factory=Where)
    stage = Stage.EDIT
    touches = frozenset("v")

    def serve(self, call: AttentionCall, rows: tuple[int, ...]) -> None:
        call.rebind(v=call.v * 2)


@dataclass(frozen=True)
class Finding:
    """One check: its name, whether it passed, and a sentence."""

    check: str
    passed: bool
    sentence: str


def prove(pipe: Any, tap: Tap | None = None) -> list[Finding]:
    """Checks on one small forward of the pipeline's transformer (of each, where it has two), each resting on those
    before; the first failure is the last one made.

    `pipe` is a pipeline or anything with a `transformer`. `tap` is an open tap to examine instead of a fresh one. A
    check that stops on an error fails with its sentence.
    """
    findings: list[Finding] = []
    if tap is None:
        for model in transformers_of(pipe):
            with Tap(model, family_of(model)) as fresh:
                findings += prove(Bare(model), fresh)
            if not findings[-1].passed:
                break
        return findings
    bench = _Bench(pipe, tap)
    checks = (_kernel, _every_call_once, _layout, _nothing_changes, _every_edit_counts)
    for check in checks:
        findings.append(_run(check, bench))
        if not findings[-1].passed:
            break
    return findings


def _run(check: Callable[[_Bench], str], bench: _Bench) -> Finding:
    name = check.__name__.strip("_").replace("_", " ")
    try:
        return Finding(name, True, check(bench))
    except MmditError as error:
        return Finding(name, False, str(error))


class _Bench:
    """Runs single forwards of the tapped transformer on small random inputs."""

    def __init__(self, pipe: Any, tap: Tap) -> None:
        self.pipe, self.tap, self.model = pipe, tap, tap.model
        self.inputs: dict[str, Any] = tap.family.probe_inputs(tap.model)
        self.batch = len(self.inputs["hidden_states"])
        self.layers = len(tap.hub.layers)

    @torch.no_grad()
    def forward(self, observe: Observe | None = None, **changed: Tensor) -> Tensor:
        """The model's output; `observe` looks at each call."""
        self.tap.observe = observe
        try:
            return self.model(**(self.inputs | changed), return_dict=False)[0]
        finally:
            self.tap.observe = None

    def traced(self, *handlers: Handler) -> Tensor:
        """The model's output through the trace loop, served to `handlers`."""

        def drive(clock: Clock) -> Tensor:
            clock.tell(step=0, steps=1, branches=[Branch(prompt=i) for i in range(self.batch)])
            return self.forward()

        return Traced(self.pipe, handlers).run(drive, tap=self.tap)

    def first_calls(self, **changed: Tensor) -> dict[int, AttentionCall]:
        """The calls of layer 0 by their number: there, each row depends on its own token alone."""
        seen: dict[int, AttentionCall] = {}

        def keep(call: AttentionCall) -> None:
            if call.site.layer == 0:
                seen[call.site.call] = replace(call, q=call.q.clone(), k=call.k.clone())

        self.forward(keep, **changed)
        return seen


def _kernel(bench: _Bench) -> str:
    errors = attend.verify(bench.model.device.type, bench.model.dtype)
    return f"attention with log-sum-exp agrees with float64 to {max(errors.values()):.0e}"


def _every_call_once(bench: _Bench) -> str:
    calls: Counter[tuple[int, int]] = Counter()
    bench.forward(lambda call: calls.update([(call.site.layer, call.site.call)]))
    first = {slot.layer: slot.call for slot in bench.tap.slots}
    entries = range(bench.batch) if bench.tap.family.ragged else range(1)
    expected = {(slot.layer, slot.call + entry) for slot in bench.tap.slots for entry in entries}
    missed = sorted({layer for layer, _ in expected - set(calls)})
    doubled = sorted({layer for (layer, call), n in calls.items() if n > 1 or (layer, call) not in expected})
    if len(missed) == len(first):
        raise ProofError(
            "Every layer must call its attention through the tap. Got no call at all: the processors were replaced "
            "after tapping, as fuse_qkv_projections() does. Undo that (unfuse_qkv_projections) and tap again."
        )
    if missed:
        raise ProofError(
            f"Every layer must call its attention through the tap. Got none from layers {missed}: these bypass it "
            "with another processor. Set that processor before tapping."
        )
    if doubled:
        raise ProofError(
            f"Every layer must attend once per forward. Got more calls from layers {doubled}. The family's "
            "description must name these calls."
        )
    many = "" if len(expected) == len(first) else f", {len(expected)} calls in all"
    return f"each of {len(first)} layers seen exactly once{many}"


def _layout(bench: _Bench) -> str:
    """Change one kind of input; the rows and columns of layer 0 that change must be those the layout names."""
    text, video = bench.inputs["encoder_hidden_states"], bench.inputs["hidden_states"]
    plain, moved = bench.first_calls(), bench.first_calls(encoder_hidden_states=text + 1)
    for call, was in plain.items():
        if was.rows.text and not bench.tap.family.text_modulates:
            _same_rows("text", was.rows.text_slice, was.q, moved[call].q)
        if was.columns.text and not bench.tap.family.text_modulates:
            _same_rows("text", was.columns.text_slice, was.k, moved[call].k)
    for name, changed, expected in _video_changes(bench, video):
        moved = bench.first_calls(hidden_states=changed)
        for call, was in plain.items():
            if was.site.kind != "cross":  # by then the self attention of the block has mixed the video rows
                _same_rows(name, expected(was.rows), was.q, moved[call].q)
    layout = plain[0].layout
    return f"{layout.text} text and {layout.grid} video tokens are where the layout says ({layout.order})"


Rows = Callable[[TokenLayout], slice | list[int]]


def _video_changes(bench: _Bench, video: Tensor) -> Iterator[tuple[str, Tensor, Rows]]:
    """(what, changed hidden states, the rows of a layout that must change): all, each frame, the first row of
    patches.
    """
    grid, axis = bench.tap.family.layout(bench.model, bench.inputs).grid, bench.tap.family.frame_axis
    yield "video", video + 1, lambda rows: rows.video_slice
    for frame in range(grid.frames if axis is not None else 0):
        assert axis is not None
        per_frame = video.shape[axis] // grid.frames
        moved = video.clone()
        moved.narrow(axis, frame * per_frame, per_frame).add_(1)
        yield f"frame {frame}", moved, lambda rows, frame=frame: rows.frame_slice(frame)
    if video.dim() >= 4:
        moved = video.clone()
        moved[..., : video.shape[-2] // grid.height, :].add_(1)
        yield "top row", moved, lambda rows: [start + i for start in _starts(rows) for i in range(grid.width)]


def _starts(rows: TokenLayout) -> list[int]:
    """Where the frames begin."""
    return sorted(frame.start for frame in rows.frame_slices())


def _same_rows(name: str, expected: slice | list[int], plain: Tensor, moved: Tensor) -> None:
    wanted = list(range(expected.start, expected.stop)) if isinstance(expected, slice) else expected
    changed = (plain != moved).any(-1).any(1).any(0).nonzero().flatten().tolist()
    if changed != wanted:
        got = f"rows {changed[0]} to {changed[-1]} ({len(changed)})" if changed else "no row"
        raise ProofError(
            f"The layout must name the rows of {name} tokens. Got {wanted[0]} to {wanted[-1]} ({len(wanted)}), but the "
            f"model keeps them in {got}. Text and video are in another order, or the grid is another."
        )


def _nothing_changes(bench: _Bench) -> str:
    tap = bench.tap
    rerouted = [slot.module.processor for slot in tap.slots]
    _install(tap, tap.plain)
    try:
        plain = bench.forward()
    finally:
        _install(tap, rerouted)
    outputs = {"tapped": bench.forward(), "traced": bench.traced(), "recorded": bench.traced(_Look())}
    for name, output in outputs.items():
        if not torch.equal(output, plain):
            raise ProofError(
                f"The {name} model must give the plain model's bits. Got a difference of "
                f"{(output - plain).abs().max():.1e}. Another wrapper changes the model, or its kernel is not "
                "repeatable."
            )
    return "tapped, traced and recorded, the model is bit-identical to the plain one"


def _install(tap: Tap, processors: list[Any]) -> None:
    for slot, processor in zip(tap.slots, processors, strict=True):
        slot.module.processor = processor


def _every_edit_counts(bench: _Bench) -> str:
    plain = bench.traced()
    for slot in bench.tap.slots:
        if torch.equal(bench.traced(_Double(Where(layers=slot.layer, kinds={slot.kind}))), plain):
            raise ProofError(
                f"An edit of a layer's attention must reach the output. Got no change from layer {slot.layer}: its "
                "output projection is zero, or its result is unused. Check the checkpoint."
            )
    return f"an edit in each of {bench.layers} layers changes the output"
