"""Who traces a model: one thread at a time."""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass, field

from torch import nn


@dataclass
class Gate:
    """The lock of one model, and the thread that holds it."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    owner: int | None = None

    def mine(self) -> bool:
        return self.owner == threading.get_ident()

    def enter(self) -> None:
        """Waits until another thread's run ends."""
        self.lock.acquire()
        self.owner = threading.get_ident()

    def leave(self) -> None:
        self.owner = None
        self.lock.release()


def gate_of(model: nn.Module) -> Gate:
    """The one gate of a model, however many taps it gets."""
    return _GATES.setdefault(model, Gate())


_GATES: weakref.WeakKeyDictionary[nn.Module, Gate] = weakref.WeakKeyDictionary()
