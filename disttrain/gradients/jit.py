"""Whether XLA pays for the tape: found out on the first steps of the real training."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from disttrain.errors import ConfigError

log = logging.getLogger("disttrain")

# Of each kind: the first traces or compiles, the others are timed.
_TRIALS = 4
# XLA must win by more than the noise: it compiles anew for every shape of batch.
_WORTHWHILE = 0.97


class Plan(NamedTuple):
    """How one step runs: the tape as a plain graph or under XLA, the update fused by XLA or not."""

    tape: Literal["graph", "xla"]
    fused: bool


class JitChoice:
    """Chooses the plan of the next step; "auto" times both tapes on batches of one shape and keeps the faster.

    All plans give the same update, so trials are steps like any others. With "auto", XLA runs only for the shape that it
    was timed on: a ragged last batch is not worth a compilation.

    Args:
      setting: True, False or "auto".
      allowed: False where layers talk to other replicas inside the tape, which XLA cannot.
      agree: gathers one Python object from every worker, so that all make the same choice. Called after the same step on
        every worker, whatever shapes its batches have had.

    Raises:
      ConfigError: True where XLA is not allowed.
    """

    def __init__(self, setting: bool | str, allowed: bool, agree: Callable[[Any], list]):
        if setting is True and not allowed:
            raise ConfigError(
                "jit=True: a layer with synchronized=True talks to the other replicas inside the tape, "
                "which XLA cannot; use jit='auto' or False"
            )
        self._agree = agree
        self._auto = setting == "auto" and allowed
        self._times: dict[str, list[float]] = {"graph": [], "xla": []}
        self._steps, self._shape, self._xla_works = 0, None, True
        self._fused = True
        self._worked: set[Plan] = set()
        self.choice = None if self._auto else ("xla" if setting is True else "graph")

    def plan(self, shape: Any) -> Plan:
        """For a batch of this shape (anything that can be compared)."""
        self._shape = self._shape or shape
        wanted = self.choice or ("graph" if self._steps < _TRIALS else "xla")
        if self._auto and not (shape == self._shape and self._xla_works):
            wanted = "graph"
        return Plan(wanted, self._fused)

    def record(self, plan: Plan, shape: Any, seconds: float) -> None:
        """Takes note of how long a step took; after the last trial, chooses."""
        self._worked.add(plan)
        if self.choice:
            return
        self._steps += 1
        if shape == self._shape:
            self._times[plan.tape].append(seconds)
        if self._steps == 2 * _TRIALS:
            self._choose()

    def _choose(self) -> None:
        mine = [min(self._times[tape][1:], default=float("inf")) for tape in ("graph", "xla")]
        graph, xla = map(max, zip(*self._agree(mine), strict=True))
        self.choice = "xla" if xla < graph * _WORTHWHILE else "graph"
        log.info("jit='auto': %s (a step took %.1f ms with XLA, %.1f ms without)", self.choice, 1e3 * xla, 1e3 * graph)

    def give_up(self, plan: Plan, error: Exception) -> bool:
        """Whether a step that failed should be done again with less XLA: only if it is XLA that cannot compile it."""
        if plan in self._worked or not any(word in str(error) for word in ("XLA", "xla", "uncompilable")):
            return False
        if plan.tape == "xla" and self._auto and not self.choice:
            self._xla_works = False
            log.warning("XLA cannot compile this model, the tape runs without it (%s)", _first_line(error))
            return True
        if plan.fused:
            self._fused = False
            log.warning("XLA cannot compile this update, it runs without (%s)", _first_line(error))
            return True
        return False


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__
