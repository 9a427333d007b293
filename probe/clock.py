"""The one owner of time: which denoising step, turn and branches the next model forward belongs to.

Told by a sampler, or read from the model's own `timestep`: told beats read. Never counted from layers or trace
iterations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from probe.errors import TapError
from probe.site import Branch


@dataclass
class Clock:
    """State of one run. A sampler calls `tell` before each model forward; otherwise `read_steps` and `read_branches`
    are asked.
    """

    read_steps: Callable[[], int]
    read_branches: Callable[[int], tuple[Branch, ...]]
    step: int = -1
    turn: int = 0
    steps: int = 0
    timestep: float = float("nan")
    branches: tuple[Branch, ...] = ()
    _told: bool = field(default=False, repr=False)
    _ever_told: bool = field(default=False, repr=False)

    def tell(self, step: int, steps: int, branches: Sequence[Branch], turn: int = 0) -> None:
        """Say what the next forward is: step `step` of `steps`, its nth forward, and its batch entries."""
        self.step, self.steps, self.turn, self.branches = step, steps, turn, tuple(branches)
        self._told = self._ever_told = True

    def forward(self, timestep: Tensor, batch: int) -> None:
        """A model forward begins. Reads the time unless it was told.

        A read step is the nth distinct timestep, its turn the nth forward at that timestep. Schedulers that repeat a
        timestep (Heun) need to be told. Reading costs one device sync per forward.

        Raises:
            TapError: more steps than the run has (a second pipeline call in one trace), or told only now and then.
        """
        if not self._told:
            if self._ever_told:
                raise TapError(
                    "A loop that tells the clock must tell it before each model forward. Got a forward it did not "
                    "announce. Call clock.tell() before each."
                )
            self._read(float(timestep.max()), batch)
        self._told = False
        if not 0 <= self.step < self.steps:
            raise TapError(
                f"A trace must cover one run of {self.steps} steps. Got step {self.step}. Trace each pipeline call by "
                "itself."
            )

    def _read(self, now: float, batch: int) -> None:
        new = now != self.timestep
        self.step, self.turn = (self.step + 1, 0) if new else (self.step, self.turn + 1)
        self.timestep, self.steps, self.branches = now, self.read_steps(), self.read_branches(batch)
