"""The one nnsight trace loop: visits every attention call in model order and serves it.

Users never write a trace body for this; deep `.source` operations silently bind to the wrong denoising step when
sites are sparse.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nnsight import save

from probe import serve
from probe.clock import Clock, branches_of, step_of, steps_of
from probe.errors import TapError
from probe.layout import TokenLayout
from probe.models.family import arguments_of, transformers_of
from probe.models.registry import family_of
from probe.once import Repeats, repeats
from probe.plan import Handler, Plan
from probe.tap import Forward, Place, Tap
from probe.word import Prompt, tokenize


class Traced:
    """A pipeline whose attention calls are served to `handlers`. Call it as the pipeline itself, or `run` any loop
    over it.
    """

    def __init__(self, pipe: Any, handlers: Sequence[Handler], fuse: bool = False) -> None:
        self.pipe, self.handlers, self.fuse = pipe, tuple(handlers), fuse
        self.family = family_of(pipe.transformer)
        self.layout: TokenLayout | None = None
        self.computed: Counter[str] = Counter()
        """How the changed weights of the last run were computed ("split", "gather", ..), and in how many calls."""
        self.passes = 0
        """Batch entries of single layers that the last run computed."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The pipeline's own call and output; `prompt` tells the words."""
        call = arguments_of(self.pipe, args, kwargs)
        asked = call.get("prompt")
        texts = [asked] if isinstance(asked, str) else list(asked or ())
        return self.run(lambda _: self.pipe(*args, **kwargs), texts, call=call)

    def tokenize(self, texts: Sequence[str], **call: Any) -> tuple[Prompt, ...]:
        """The prompts as this pipeline's text encoders cut them in a call with the arguments `call`; none if one is
        empty (it shows no word, which a stock pipeline allows), or if the encoders get different ones.
        """
        texts = self.family.texts(texts, call)
        if not all(text.strip() for text in texts):
            return ()
        return tokenize(self.family.encoders(self.pipe, call), texts) if texts else ()

    def plan(self, steps: int, prompts: Sequence[Prompt] = ()) -> Plan:
        """The handlers bound to this model and a run of `steps` steps; refuses what cannot work."""
        slots = self.family.slots(self.pipe.transformer)
        places = [(slot.layer, slot.kind) for slot in slots]
        layers, heads = 1 + max(slot.layer for slot in slots), getattr(slots[0].module, "heads", None)
        return Plan(self.handlers, steps, layers, prompts, places=places, heads=heads, fuse=self.fuse)

    def run(
        self,
        drive: Callable[[Clock], Any],
        prompts: Sequence[str | Prompt] = (),
        tap: Tap | None = None,
        call: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run `drive(clock)`, which makes the model go however it likes, and return its result.

        `drive` may tell the clock each step; else time is read from the model. `prompts` are texts, or what `tokenize`
        made of them; `call` are arguments of the pipeline's call, which may change how texts are cut. `tap` is one that
        is open already.

        Raises:
            PlanError: handlers clash, or one met no call.
            TapError: attention calls were missed.
        """
        if tap is None:
            model, *others = transformers_of(self.pipe)
            with Tap(model, self.family, *others) as fresh:
                return self.run(drive, prompts, fresh, call)
        call = call or {}
        cut = tuple(prompt for prompt in prompts if isinstance(prompt, Prompt))  # fast tokenizers serve one thread
        cut = cut or self.tokenize([str(prompt) for prompt in prompts], **call)
        run = _Run(self, tap, cut, len(prompts), self.family.copies(call))
        idle, before = (tap.on_forward, tap.place), tap.passes
        tap.on_forward, tap.place = run.forward, run.place
        try:
            result = _follow(tap, lambda: drive(run.clock), run)
        finally:
            tap.on_forward, tap.place = idle
            for handler in self.handlers:
                handler.end()
        run.finish()
        self.passes = tap.passes - before
        return result


def trace(pipe: Any, *handlers: Handler, fuse: bool = False) -> Traced:
    """Attach readouts and interventions to a pipeline: `trace(pipe, WordMaps("cat"))(prompt="a cat",
    num_inference_steps=20)`.

    Recording never changes a bit of the output. `fuse=True` trades that for speed: a readout that measures in parts
    (FrameMass, RegionMass) then also produces the output of its calls, equal up to rounding (2e-7 in float32).
    """
    return Traced(pipe, handlers, fuse)


class _Run:
    """One run: its clock, its plan (bound at the first forward, when the number of steps is known), its missed
    layers.
    """

    def __init__(self, traced: Traced, tap: Tap, prompts: tuple[Prompt, ...], asked: int, copies: int) -> None:
        self.traced, self.tap, self.prompts = traced, tap, prompts
        pipe = traced.pipe
        self.clock = Clock(
            lambda: steps_of(pipe.scheduler), lambda batch, name: branches_of(batch, asked, copies, name, pipe)
        )
        self.plan: Plan | None = None
        self.first_step = 0

    def forward(self, told: Forward, layout: TokenLayout) -> Repeats | None:
        """Learn where the run is; what of the batch can be computed once."""
        step, batch = step_of(getattr(self.traced.pipe, "scheduler", None), told.step), told.batch
        self.clock.forward(told.timestep, batch, told.name, step)
        self.traced.layout = layout
        if len(self.clock.branches) != batch or len(self.clock.alike) not in (0, batch):
            raise TapError(
                f"The branches told must be as many as the batch entries. Got {len(self.clock.branches)} branches for "
                f"a batch of {batch}. Tell one branch per entry."
            )
        if self.plan is None:
            self.first_step = self.clock.step
            self.plan = self.traced.plan(self.clock.steps, self.prompts)
        clock = self.clock
        return repeats(clock.alike, clock.branches, self.plan, clock.step, clock.turn) if clock.alike else None

    def place(self) -> Place:
        return Place(self.clock.step, self.clock.turn, self.clock.branches, self.prompts)

    def finish(self) -> None:
        missed = self.tap.missed()
        if missed:
            raise TapError(
                f"Every layer must call its attention through the tap. Got none from layers {missed}: their "
                "processors were replaced after tapping, for example by fuse_qkv_projections(). Undo that first."
            )
        if self.plan is not None:
            self.plan.refuse_unmet(self.first_step)
        self.traced.computed = Counter()
        for (_, way), count in self.plan.how.items() if self.plan is not None else ():
            self.traced.computed[way] += count


def _follow(tap: Tap, drive: Callable[[], Any], run: _Run) -> Any:
    """The only trace body. It calls functions and binds nothing else: names bound in a trace keep their tensors
    alive.
    """

    def driven(_: object) -> Any:
        result = drive()
        tap.hub(None)  # ends the open iteration without a warning
        return result

    hub: Any = tap.nnsight
    with hub.trace(True, fn=driven) as tracer:
        for _ in tracer.iter[:]:
            if _visit(hub, run):
                break
        result = save(tracer.result)
    return result


def _visit(hub: Any, run: _Run) -> bool:
    """Serve the next attention call; True at the end of the run."""
    call = hub.input
    if call is None:
        return True
    plan = run.plan
    if plan is None or not plan.at(call.site):
        return False
    serve.before_attention(call, plan)
    if call.out is not None:
        hub.skip(call.out)
    given = hub.output
    result = serve.after_attention(call, plan, given)
    if result is not given:
        hub.output = result
    return False
