"""`mmdit bench ditctrl`: what a story costs beside clips of its prompts, and beside the authors' schedule of pairs.

A random CogVideoX; what is timed are its forwards and the blending of one step that shares keys and values and of one
that does not, weighed as often as a run of 50 steps has them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from control.denoise import guide
from ditctrl.condition import conditions
from ditctrl.method import MultiPrompt
from ditctrl.objects import OfSegments, pairs
from ditctrl.overlap import blend
from ditctrl.segment import Segments
from ditctrl.sharing import Chunks, Window, layer_passes, reference_passes, share_previous, shared_where
from ditctrl.wordmask import WordMasks, keep_apart, up_to
from probe.clock import Clock
from probe.models.load import Bare
from probe.plan import Handler
from probe.site import Where
from probe.tracer import Traced
from recipes.benches.attention import NAIVE_KEYS, WORDS, Shape, prompt_of
from recipes.benches.pairs import pair_attention
from recipes.benches.record import random_model
from recipes.benches.timing import Method, Timed, measure

STEPS = 50
GUIDANCE = 6.0


@dataclass(frozen=True)
class Case:
    """A story: its segments, and where they share."""

    segments: Segments
    window: Window

    @property
    def steps(self) -> tuple[int, int]:
        """Steps that share and steps that do not."""
        return len(self.window.steps), STEPS - len(self.window.steps)

    @property
    def kinds(self) -> tuple[int, int]:
        """A step of either kind."""
        return self.window.steps.start, self.window.steps.stop


def cases(length: int, layers: int, most: int) -> Iterator[Case]:
    """Stories of 2, 3, .. prompts in the code's geometry, and of 2 in the paper's."""
    window = Window.scaled(STEPS, layers)
    for prompts in [n for n in (2, 3, 5, 10) if n <= most]:
        yield Case(Segments.scaled(prompts, length), window)
    yield Case(Segments.scaled(2, length, 1), window)


class Bench:
    """One random model and the latents of one story after the other."""

    def __init__(self, shape: Shape, layers: int, device: str, dtype: torch.dtype, chunks: Chunks) -> None:
        self.shape, self.layers, self.device, self.chunks = shape, layers, device, chunks
        self.model = random_model(shape, device, dtype, layers)
        self.loop: Any = _Forwards(self.model)
        self.prompt = prompt_of(shape.text)

    def measured(self, case: Case, rounds: int) -> list[dict[str, Any]]:
        """One row for each way to make the story, with its numbers."""
        drawn = torch.Generator().manual_seed(0)
        size = (1, case.segments.frames, 16, 2 * self.shape.grid.height, 2 * self.shape.grid.width)
        latents = torch.randn(size, generator=drawn).to(self.device)
        text = torch.randn(case.segments.prompts, self.shape.text, 64, generator=drawn).to(self.device)
        ways = self._ways(case, latents, text)
        methods = [
            Method("step", f"{name} {step}", lambda run=run, step=step: run(step))
            for name, (_, run) in ways.items()
            for step in case.kinds
        ]
        timed = iter(measure(methods, self.device, rounds))
        found = {name: (passes, next(timed), next(timed)) for name, (passes, _) in ways.items()}
        return [self._row(case, name, found) | self._error(case, name, ways) for name in found]

    def _error(self, case: Case, name: str, ways: dict[str, tuple[float, Callable[[int], Any]]]) -> dict[str, Any]:
        """The largest difference to the authors' schedule in a step that shares, relative to the largest value."""
        reference = name.replace("ours", "pairs")
        if "ours" not in name or reference not in ways:
            return {"difference": None}
        mine, theirs = (ways[way][1](case.kinds[0]).double() for way in (name, reference))
        return {"difference": float((mine - theirs).abs().max() / theirs.abs().max())}

    def _ways(self, case: Case, latents: Tensor, text: Tensor) -> dict[str, tuple[float, Callable[[int], Any]]]:
        """By name: layer passes of a run, and one step of it."""
        segments, layers = case.segments, self.layers
        own = sum(layer_passes(segments, case.window, STEPS, layers, self.chunks))
        reference = reference_passes(segments, STEPS, layers)
        clips = 2 * segments.prompts * STEPS * layers
        ways: dict[str, tuple[float, Callable[[int], Any]]] = {
            f"{segments.prompts} clips": (clips, lambda step: self._clips(segments, latents, text, step)),
            "pairs": (reference, lambda step: self._pairs(case, latents, text, step, False)),
            "ours": (own, self._ours(case, latents, text, False)),
        }
        if self.shape.text + self.shape.grid.size <= NAIVE_KEYS:
            ways["pairs+mask"] = reference, lambda step: self._pairs(case, latents, text, step, True)
        ways["ours+mask"] = own, self._ours(case, latents, text, True)
        return ways

    def _row(self, case: Case, name: str, found: dict[str, tuple[float, Timed, Timed]]) -> dict[str, Any]:
        def seconds(way: str) -> float:
            share, rest = case.steps
            _, sharing, plain = found[way]
            return (share * sharing.seconds + rest * plain.seconds) / STEPS

        segments, (passes, *steps) = case.segments, found[name]
        mine = seconds(name)
        return {
            "prompts": segments.prompts,
            "segments": segments.count,
            "latent frames": segments.frames,
            "way": name,
            "passes": passes,
            "passes / pairs": passes / found["pairs"][0],
            "time / pairs": mine / seconds("pairs"),
            "time / clips": mine / seconds(next(iter(found))),
            "seconds a step": mine,
            "seconds a latent frame": mine * STEPS / segments.frames,
            "extra bytes": max(step.memory for step in steps),
        }

    @torch.no_grad()
    def _clips(self, segments: Segments, latents: Tensor, text: Tensor, step: int) -> None:
        """A clip of each prompt by itself, both halves of guidance in one forward."""
        for prompt in range(segments.prompts):
            clip, shown = latents[:, : segments.length], text[prompt : prompt + 1]
            both = torch.cat([torch.zeros_like(shown), shown])
            guide(self.loop.forward(torch.cat([clip, clip]), both, step), GUIDANCE)

    @torch.no_grad()
    def _pairs(self, case: Case, latents: Tensor, text: Tensor, step: int, masked: bool) -> Tensor:
        """The authors' schedule: one forward of [u_k, u_k+1, c_k, c_k+1] per pair."""
        segments, parts, columns = case.segments, [], self.prompt.tokens_of(WORDS[0]) if masked else None
        shown, zeros = conditions(segments, text), torch.zeros_like(text[:1])
        for k in range(segments.count - 1):
            clips = torch.cat([latents[:, segments.window(k)], latents[:, segments.window(k + 1)]])
            both = torch.cat([zeros, zeros, shown[k : k + 2]])
            with pair_attention(case.window.layers if step in case.window.steps else range(0), columns, self.shape):
                guided = guide(self.loop.forward(torch.cat([clips, clips]), both, step), GUIDANCE)
            parts += [(k, 1.0, guided[0]), (k + 1, 1.0, guided[1])]
        return blend(segments, parts)

    def _ours(self, case: Case, latents: Tensor, text: Tensor, masked: bool) -> Callable[[int], Tensor]:
        where = shared_where(case.window)
        handlers: list[Handler] = [share_previous(case.segments, chunks=self.chunks, where=where)]
        if masked:
            pairing = OfSegments(case.segments, pairs(case.segments.prompts, WORDS[0]))
            masks = WordMasks(pairing, Where(steps=case.window.steps, layers=up_to(case.window.layers)))
            handlers += [masks, keep_apart(masks, where)]

        @torch.no_grad()
        def run(step: int) -> Tensor:
            def drive(clock: Clock) -> Tensor:
                negative = torch.zeros_like(text[:1])
                scale = lambda _: GUIDANCE  # noqa: E731
                method = MultiPrompt(self.loop, case.segments, text, negative, scale, case.window, clock, self.chunks)
                return method(latents, step)

            inside = handlers if step in case.window.steps else []
            return Traced(Bare(self.model), inside).run(drive, [self.prompt] * case.segments.prompts)

        return run


class _Forwards:
    """What the method needs of a loop: forwards of the model."""

    def __init__(self, model: Any) -> None:
        self.model, self.steps, self.timesteps = model, STEPS, [500] * STEPS

    def forward(self, latents: Tensor, text: Tensor, step: int) -> Tensor:
        model = self.model
        when = torch.full((len(latents),), self.timesteps[step], device=latents.device)
        return model(latents.to(model.dtype), text.to(model.dtype), when, return_dict=False)[0].float()
