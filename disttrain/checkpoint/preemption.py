"""Signals that ask a training to save and end: Slurm's and Kubernetes' SIGTERM, SIGUSR1, and a first Ctrl-C."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

from disttrain.world import ASKED

_ASK = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Preemption:
    """Within it, the signals above set `requested` and do nothing else. A second Ctrl-C ends at once, as ever.

    A rank that is started after its job was asked to end counts as asked.

    Attributes:
      requested: name of the signal that has come, or that it came before this rank was started; empty if none has.
    """

    def __init__(self):
        self.requested = ""

    def __enter__(self) -> Preemption:
        self.requested = "before it was started" if ASKED in os.environ else ""
        self._before = {}
        if threading.current_thread() is threading.main_thread():  # Python hears signals nowhere else
            self._before = {number: signal.signal(number, self._hear) for number in _ASK}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.requested == "SIGINT":
            raise KeyboardInterrupt
        self.requested = signal.Signals(number).name
