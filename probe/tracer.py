"""The one nnsight trace loop: visits every attention call in model order and serves it.

Users never write a trace body for this; deep `.source` operations silently bind to the wrong denoising step when
sites are sparse.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from nnsight import save
from torch import Tensor

from probe import serve
from probe.call import AttentionCall
from probe.clock import Clock
from probe.errors import TapError
from probe.layout import TokenLayout
from probe.models.registry import family_of
from probe.plan import Handler, Plan
from probe.site import Site
from probe.tap import Tap
from probe.word import Prompt, tokenize


class Traced:
    """A pipeline whose attention calls are served to `handlers`. Call it as the pipeline itself, or `run` any loop
    over it.
    """

    def __init__(self, pipe: Any, handlers: Sequence[Handler]) -> None:
        self.pipe, self.handlers = pipe, tuple(handlers)
        self.family = family_of(pipe.transformer)
        self.layout: TokenLayout | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The pipeline's own call and output; `prompt` tells the words."""
        asked = args[0] if args else kwargs.get("prompt")
        texts = [asked] if isinstance(asked, str) else list(asked or ())
        return self.run(lambda _: self.pipe(*args, **kwargs), texts)

    def tokenize(self, texts: Sequence[str]) -> tuple[Prompt, ...]:
        """The prompts as this pipeline's text encoder cuts them."""
        return tokenize(self.pipe.tokenizer, texts, self.family.text_length(self.pipe.transformer))

    def run(self, drive: Callable[[Clock], Any], prompts: Sequence[str] = (), tap: Tap | None = None) -> Any:
        """Run `drive(clock)`, which makes the model go however it likes, and return its result.

        `drive` may tell the clock each step; else time is read from the model. `tap` is one that is open already.

        Raises:
            PlanError: handlers clash, or one met no call.
            TapError: attention calls were missed.
        """
        if tap is None:
            with Tap(self.pipe.transformer, self.family) as fresh:
                return self.run(drive, prompts, fresh)
        run = _Run(self, tap, self._prompts(prompts))
        idle = tap.on_forward, tap.make_call
        tap.on_forward, tap.make_call = run.forward, run.call
        try:
            result = _follow(tap, lambda: drive(run.clock), run)
        finally:
            tap.on_forward, tap.make_call = idle
        run.finish()
        return result

    def _prompts(self, texts: Sequence[str]) -> tuple[Prompt, ...]:
        """The prompts for readouts; one that is empty shows no word, which the stock pipeline allows."""
        return self.tokenize(texts) if all(text.strip() for text in texts) else ()


def trace(pipe: Any, *handlers: Handler) -> Traced:
    """Attach readouts and interventions to a pipeline: `trace(pipe, WordMaps("cat"))(prompt="a cat",
    num_inference_steps=20)`.
    """
    return Traced(pipe, handlers)


class _Run:
    """One run: its clock, its plan (bound at the first forward, when the number of steps is known), its missed
    layers.
    """

    def __init__(self, traced: Traced, tap: Tap, prompts: tuple[Prompt, ...]) -> None:
        self.traced, self.tap, self.prompts = traced, tap, prompts
        pipe, family = traced.pipe, traced.family
        self.clock = Clock(
            lambda: len(pipe.scheduler.timesteps), lambda batch: family.branches(batch, len(prompts) or None, pipe)
        )
        self.plan: Plan | None = None
        self.first_step = 0
        self.layers_seen: set[int] = set()

    def forward(self, timestep: Tensor, batch: int, layout: TokenLayout) -> None:
        self.clock.forward(timestep, batch)
        self.traced.layout = layout
        if len(self.clock.branches) != batch:
            raise TapError(
                f"The branches told must be as many as the batch entries. Got {len(self.clock.branches)} branches for "
                f"a batch of {batch}. Tell one branch per entry."
            )
        if self.plan is None:
            self.first_step = self.clock.step
            self.plan = Plan(self.traced.handlers, self.clock.steps, len(self.tap.modules), self.prompts)

    def call(
        self, layer: int, nth: int, q: Tensor, k: Tensor, v: Tensor, scale: Any, layout: TokenLayout
    ) -> AttentionCall:
        self.layers_seen.add(layer)
        site = Site(self.clock.step, self.clock.turn, layer, nth)
        return AttentionCall(site, q, k, v, scale, layout, self.clock.branches, self.prompts)

    def finish(self) -> None:
        missed = sorted(set(range(len(self.tap.modules))) - self.layers_seen)
        if missed:
            raise TapError(
                f"Every layer must call its attention through the tap. Got none from layers {missed}: their "
                "processors were replaced after tapping, for example by fuse_qkv_projections(). Undo that first."
            )
        if self.plan is not None:
            self.plan.refuse_unmet(self.first_step)


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
