"""A model proves itself: its layout is right, every attention call is seen once, nothing changes unasked, and every
edit counts.

`mmdit check` runs this on load. Each finding that fails says in its own sentence what is wrong.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from probe import attend
from probe.call import AttentionCall
from probe.clock import Clock
from probe.errors import MmditError, ProofError
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
    """Checks on one small forward of the pipeline's transformer, each resting on those before; the first failure is
    the last one made.

    `tap` is an open tap to examine instead of a fresh one. A check that stops on an error fails with its sentence.
    """
    if tap is None:
        with Tap(pipe.transformer, family_of(pipe.transformer)) as fresh:
            return prove(pipe, fresh)
    bench = _Bench(pipe, tap)
    checks = (_kernel, _every_call_once, _layout, _nothing_changes, _every_edit_counts)
    findings: list[Finding] = []
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
        self.inputs: dict[str, Any] = tap.family.probe_inputs(pipe)
        self.layers = len(tap.modules)

    @torch.no_grad()
    def forward(self, observe: Observe | None = None, **changed: Tensor) -> Tensor:
        """The model's output; `observe` looks at each call."""
        make = self.tap.make_call

        def watched(*arguments: Any) -> AttentionCall:
            call = make(*arguments)
            if observe is not None:
                observe(call)
            return call

        self.tap.make_call = watched
        try:
            return self.model(**(self.inputs | changed), return_dict=False)[0]
        finally:
            self.tap.make_call = make

    def traced(self, *handlers: Handler) -> Tensor:
        """The model's output through the trace loop, served to `handlers`."""

        def drive(clock: Clock) -> Tensor:
            clock.tell(step=0, steps=1, branches=[Branch()])
            return self.forward()

        return Traced(self.pipe, handlers).run(drive, tap=self.tap)

    def first_queries(self, **changed: Tensor) -> Tensor:
        """q of layer 0, [B, H, N, D]: each row depends on its own token alone."""
        seen: list[Tensor] = []
        self.forward(lambda call: seen.append(call.q.clone()) if call.site.layer == 0 else None, **changed)
        return seen[0]


def _kernel(bench: _Bench) -> str:
    parameter = next(bench.model.parameters())
    errors = attend.verify(parameter.device.type, parameter.dtype)
    return f"attention with log-sum-exp agrees with float64 to {max(errors.values()):.0e}"


def _every_call_once(bench: _Bench) -> str:
    calls: Counter[int] = Counter()
    bench.forward(lambda call: calls.update([call.site.layer]))
    missed = [layer for layer in range(bench.layers) if not calls[layer]]
    doubled = [layer for layer, n in calls.items() if n > 1]
    if len(missed) == bench.layers:
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
            f"Every layer must attend once per forward. Got more calls from layers {sorted(doubled)}. The family's "
            "description must name these calls."
        )
    return f"each of {bench.layers} layers seen exactly once"


def _layout(bench: _Bench) -> str:
    """Change one kind of input; the rows of layer 0 that change must be those the layout names."""
    plain = bench.first_queries()
    layout = bench.tap.layout
    if layout is None or plain.shape[-2] != layout.total:
        raise ProofError(
            f"The layout must have as many tokens as the model attends to. Got {layout} for {plain.shape[-2]}. Mend "
            "the family's layout."
        )
    text, video = bench.inputs["encoder_hidden_states"], bench.inputs["hidden_states"]
    _same_rows("text", layout.text_slice, plain, bench.first_queries(encoder_hidden_states=text + 1))
    _same_rows("video", layout.video_slice, plain, bench.first_queries(hidden_states=video + 1))
    per_token = video.shape[1] // layout.grid.frames
    for frame in range(layout.grid.frames):
        moved = video.clone()
        moved[:, frame * per_token : (frame + 1) * per_token] += 1
        _same_rows(f"frame {frame}", layout.frame_slice(frame), plain, bench.first_queries(hidden_states=moved))
    return f"{layout.text} text and {layout.grid} video tokens are where the layout says ({layout.order})"


def _same_rows(name: str, expected: slice, plain: Tensor, moved: Tensor) -> None:
    changed = (plain != moved).any(-1).any(1).any(0).nonzero().flatten().tolist()
    if changed != list(range(expected.start, expected.stop)):
        got = f"rows {changed[0]} to {changed[-1]} ({len(changed)})" if changed else "no row"
        raise ProofError(
            f"The layout must name the rows of {name} tokens. Got {expected.start} to {expected.stop - 1}, but the "
            f"model keeps them in {got}. Text and video are in another order, or the grid is another."
        )


def _nothing_changes(bench: _Bench) -> str:
    tap = bench.tap
    rerouted = [module.processor for module in tap.modules]
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
    for module, processor in zip(tap.modules, processors, strict=True):
        module.processor = processor


def _every_edit_counts(bench: _Bench) -> str:
    plain = bench.traced()
    for layer in range(bench.layers):
        if torch.equal(bench.traced(_Double(Where(layers=layer))), plain):
            raise ProofError(
                f"An edit of a layer's attention must reach the output. Got no change from layer {layer}: its output "
                "projection is zero, or its result is unused. Check the checkpoint."
            )
    return f"an edit in each of {bench.layers} layers changes the output"
