"""The one owner of time: which denoising step, turn and branches the next model forward belongs to.

Told by a sampler, or read from the model's own `timestep`: told beats read. Never counted from layers or trace
iterations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from probe.errors import TapError
from probe.site import Branch


@dataclass
class Clock:
    """State of one run. A sampler calls `tell` before each model forward; otherwise `read_steps` and `read_branches`
    are asked.
    """

    read_steps: Callable[[], int]
    read_branches: Callable[[int, str | None], tuple[Branch, ...]]
    step: int = -1
    turn: int = 0
    steps: int = 0
    timestep: float = float("nan")
    branches: tuple[Branch, ...] = ()
    alike: tuple[int, ...] = ()
    _told: bool = field(default=False, repr=False)
    _ever_told: bool = field(default=False, repr=False)

    def tell(self, step: int, steps: int, branches: Sequence[Branch], turn: int = 0, alike: Sequence[int] = ()) -> None:
        """Say what the next forward is: step `step` of `steps`, its nth forward, and its batch entries.

        `alike[i]` is the first entry with the same latents, text and timestep as entry i: such entries are computed
        once up to the layer where an edit tells them apart.
        """
        self.step, self.steps, self.turn, self.branches = step, steps, turn, tuple(branches)
        self.alike = tuple(alike)
        self._told = self._ever_told = True

    def forward(self, timestep: Tensor, batch: int, name: str | None = None, step: int | None = None) -> None:
        """A model forward begins. Reads the time unless it was told.

        `name` is what the pipeline calls this forward (cond, uncond, cond_uncond) and `step` the step it or its
        scheduler says it is. Where neither says so, a step is the nth distinct timestep, which costs one device sync
        per forward. The turn is the nth forward of the step.

        Raises:
            TapError: more steps than the run has (a second pipeline call in one trace), or told only now and then.
        """
        if not self._told:
            if self._ever_told:
                raise TapError(
                    "A loop that tells the clock must tell it before each model forward. Got a forward it did not "
                    "announce. Call clock.tell() before each."
                )
            self._read(timestep, step)
            self.steps, self.branches = self.read_steps(), self.read_branches(batch, name)
            self.alike = ()
        self._told = False
        if not 0 <= self.step < self.steps:
            raise TapError(
                f"A trace must cover one run of {self.steps} steps. Got step {self.step}. Trace each pipeline call by "
                "itself."
            )

    def _read(self, timestep: Tensor, step: int | None) -> None:
        before = self.step
        if step is None:
            now = float(timestep.max())
            step, self.timestep = before + (now != self.timestep), now
        self.step, self.turn = step, self.turn + 1 if step == before else 0


def branches_of(batch: int, prompts: int, copies: int, name: str | None, pipe: Any) -> tuple[Branch, ...]:
    """The batch entries of a stock pipeline's forward, for `prompts` prompts (0: not known) of `copies` videos each,
    which stand side by side.

    A forward named cond or uncond is one half of guidance. Any other holds [unconditional.., conditional..] or the
    conditional half alone: its batch says which, or whether the pipeline guides where prompts are not known.

    Raises:
        TapError: which half a forward is cannot be told.
    """
    each = prompts * copies
    if name in ("cond", "uncond"):
        halves: tuple[bool, ...] = (name == "cond",)
    elif name is None and batch == each and _guides(pipe):
        raise TapError(
            "A forward of a pipeline that guides must be named or hold both halves. Got an unnamed one of "
            f"{batch} batch entries for {prompts} prompts by {type(pipe).__name__}. Tell the clock its branches."
        )
    else:
        doubled = batch == 2 * each if each and batch in (each, 2 * each) else batch % 2 == 0 and _guides(pipe)
        halves = (False, True) if doubled else (True,)
    side = batch // len(halves)
    copies = max(1, side // prompts) if prompts else copies
    return tuple(Branch(prompt=i // copies, guided=guided, copy=i % copies) for guided in halves for i in range(side))


def _guides(pipe: Any) -> bool:
    guidance = getattr(pipe, "guidance_scale", None) or 0
    return getattr(pipe, "do_classifier_free_guidance", guidance > 1)


def steps_of(scheduler: Any) -> int:
    """Denoising steps of a scheduler that was set: one that evaluates the model twice a step (Heun) counts once."""
    return -(-len(scheduler.timesteps) // getattr(scheduler, "order", 1))


def step_of(scheduler: Any, evaluation: int | None = None) -> int | None:
    """The step a scheduler is at, from the `evaluation` a pipeline says it makes, else by the scheduler's own count;
    None before its first step, or where it keeps no count: timesteps tell it. (In half precision timesteps that lie
    close together round to the same number.)
    """
    if evaluation is None and getattr(scheduler, "step_index", None) is not None:
        evaluation = scheduler.step_index - (getattr(scheduler, "begin_index", None) or 0)
    return None if evaluation is None else evaluation // getattr(scheduler, "order", 1)
