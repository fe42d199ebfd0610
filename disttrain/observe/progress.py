"""A progress bar with loss, gradient norm and speed; under `disttrain run` it is drawn there, one for all ranks."""

from __future__ import annotations

import os
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

from disttrain.types import StepOutput
from disttrain.world import PROGRESS_FD, tell_launcher

# Numbers are fetched from the device only so often: a person cannot read faster.
_SECONDS_BETWEEN_UPDATES = 0.2


class Progress:
    """Context manager; `advance` after every step.

    Args:
      title: shown before the bar.
      total: number of steps, None if unknown.
      done: steps that were done before.
      enabled: False shows nothing.
    """

    def __init__(self, title: str, total: int | None, done: int = 0, *, enabled: bool = True):
        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=8),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            # All of it fits into 80 columns.
            console=Console(stderr=True),
            disable=not enabled or PROGRESS_FD in os.environ,
        )
        self._title, self._total, self._enabled = title, total, enabled
        self._task = self._bar.add_task(title, total=total, completed=done, numbers="tracing")
        self._shown, self._done, self._last = 0.0, done, None

    def advance(self, out: StepOutput, examples_per_second: float) -> None:
        """One more step is done."""
        self._done += 1
        now = time.monotonic()
        if now - self._shown > _SECONDS_BETWEEN_UPDATES:
            self._show(out, examples_per_second)
            self._shown = now
        self._last = (out, examples_per_second)

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._last:
            self._show(*self._last)
        self._bar.stop()

    def _show(self, out: StepOutput, speed: float) -> None:
        numbers = f"loss {float(out.loss):.4f}, grad norm {float(out.grad_norm):.3f}, {speed:,.0f} ex/s"
        self._bar.update(self._task, completed=self._done, numbers=numbers)
        if self._enabled:
            tell_launcher({"title": self._title, "total": self._total, "done": self._done, "numbers": numbers})
