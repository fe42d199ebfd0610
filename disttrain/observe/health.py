"""Which rank holds up the others, by how much and with what; and whether training waits for data.

All ranks leave the all-reduce together, so a step takes all of them equally long. What tells them apart is how long they
waited in it: the slowest waits least. A rank's own time is therefore that of a step without this wait.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from statistics import median_low
from typing import Any, NamedTuple

from disttrain.types import StepOutput

log = logging.getLogger("disttrain")

# Of a step's time: what is less is not worth a person's attention.
_WORTH_SAYING = 0.1
# To start an epoch and to cut a batch takes some milliseconds for each, which only a tiny model's steps do not dwarf, and which
# no other way of reading makes shorter.
_HANDING_OVER_SECONDS = 0.005
# One hiccup in a shorter time looks like a slow rank.
_ENOUGH_SECONDS = 2.0
# An exchange takes some milliseconds, so that it costs less than a thousandth.
_SECONDS_BETWEEN = 10.0
_STEPS_BETWEEN = 10

_SLOW = {
    "input": "Its input is slow",
    "computing": "Its computing is slow",
    "between": "What it does between steps (saving, showing) is slow",
}


@dataclasses.dataclass(frozen=True)
class Times:
    """What one rank's time went into: sums over steps.

    Attributes:
      rank: of the group.
      host: where it runs.
      steps: how many are summed up. Those that traced or compiled are left out.
      seconds: from the end of one step to the end of the next, all in all.
      step: seconds in the step.
      waited: seconds of these in the all-reduce; see `StepOutput.waited`.
      input: seconds until the next batch was there.
    """

    rank: int
    host: str
    steps: int = 0
    seconds: float = 0.0
    step: float = 0.0
    waited: float = 0.0
    input: float = 0.0

    def plus(self, **more: float) -> Times:
        return dataclasses.replace(self, **{name: getattr(self, name) + value for name, value in more.items()})

    def sums(self) -> dict[str, float]:
        return {name: value for name, value in vars(self).items() if name not in ("rank", "host")}

    def per_step(self, part: str) -> float:
        return getattr(self, part) / max(self.steps, 1)

    @property
    def own(self) -> float:
        """Seconds that it would have taken alone."""
        return self.seconds - self.waited

    @property
    def computing(self) -> float:
        return self.step - self.waited

    @property
    def between(self) -> float:
        return self.seconds - self.step - self.input


class Finding(NamedTuple):
    """Something that is wrong: what it is about, the same whenever it is found again, and a sentence for a person."""

    about: tuple
    said: str


def find(ranks: Sequence[Times]) -> list[Finding]:
    """What is wrong, by the times of all ranks over the same steps; nothing where they are too short to tell."""
    if min(times.seconds for times in ranks) < _ENOUGH_SECONDS:
        return []
    return _slow_rank(ranks) + _input_bound(ranks)


def input_share(ranks: Sequence[Times]) -> float:
    """Share of the time, 0 to 1, that the rank in the middle waits for data."""
    return median_low(times.input / max(times.seconds, 1e-9) for times in ranks)


def table(ranks: Sequence[Times]) -> list[dict[str, Any]]:
    """A row for each rank, JSON: rank, host, steps, and means over these steps in seconds."""
    return [
        {
            "rank": times.rank,
            "host": times.host,
            "steps": times.steps,
            "step_seconds": round(times.per_step("step"), 6),
            "waited_seconds": round(times.per_step("waited"), 6),
            "input_seconds": round(times.per_step("input"), 6),
            "between_seconds": round(times.per_step("between"), 6),
        }
        for times in ranks
    ]


def _slow_rank(ranks: Sequence[Times]) -> list[Finding]:
    """The slowest rank, where it costs more than it should: its own time beyond that of the rank in the middle."""
    slowest = max(ranks, key=lambda times: times.per_step("own"))
    own, usual = slowest.per_step("own"), _usual(ranks, "own")
    share = (own - usual) / max(times.per_step("seconds") for times in ranks)
    if share <= _WORTH_SAYING:
        return []
    part = max(_SLOW, key=lambda part: slowest.per_step(part) - _usual(ranks, part))
    said = (
        f"rank {slowest.rank} on {slowest.host} holds up every step by {_ms(own - usual)}, {100 * share:.0f} % of it: "
        f"by itself it takes {_ms(own)} where others take {_ms(usual)}. "
        f"{_SLOW[part]}: {_ms(slowest.per_step(part))} where others take {_ms(_usual(ranks, part))}"
    )
    return [Finding(("slow", slowest.rank, part), said)]


def _input_bound(ranks: Sequence[Times]) -> list[Finding]:
    share = input_share(ranks)
    if share <= _WORTH_SAYING or _usual(ranks, "input") < _HANDING_OVER_SECONDS:
        return []
    said = (
        f"input-bound: training waits {100 * share:.0f} % of the time for data, {_ms(_usual(ranks, 'input'))} for each batch; "
        "cache or prefetch it, or prepare it in parallel"
    )
    return [Finding(("input-bound",), said)]


def _usual(ranks: Sequence[Times], part: str) -> float:
    """Seconds per step of the rank in the middle; of two, the faster."""
    return median_low(times.per_step(part) for times in ranks)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.{0 if seconds >= 0.01 else 1}f} ms"


class Health:
    """Takes the times of this rank's steps, compares them with those of all others, and warns on rank 0, of each thing once.

    Args:
      rank: of this process.
      gather: gathers one object from every rank, in the order of ranks.
    """

    def __init__(self, rank: int, gather: Callable[[Any], list]):
        self._gather, self._speaks = gather, rank == 0
        self._nothing = Times(rank, socket.gethostname())
        self._times, self._total = self._nothing, []
        self._steps_left = _STEPS_BETWEEN
        self._said: set[tuple] = set()

    def reading(self, batches: Iterable) -> Iterator:
        """The batches; after the step on each, `add` is to be called."""
        self._asked = self._ended = time.perf_counter()
        for batch in batches:
            self._given = time.perf_counter()
            yield batch
            self._asked = time.perf_counter()

    def add(self, out: StepOutput) -> None:
        """One more step is done. Now and then compares ranks, after the same step on all of them."""
        now = time.perf_counter()
        if not out.traced:
            self._times = self._times.plus(
                steps=1,
                seconds=now - self._ended,
                step=now - self._given,
                waited=out.waited,
                input=self._given - self._asked,
            )
        self._ended = now
        self._steps_left -= 1
        if self._steps_left == 0:
            self.compare()

    def compare(self) -> None:
        """Looks at all ranks' times since the last comparison. All ranks come here after the same step."""
        ranks = self._gather(self._times)
        self._times = self._nothing
        before = self._total or [Times(times.rank, times.host) for times in ranks]
        self._total = [total.plus(**times.sums()) for total, times in zip(before, ranks, strict=True)]
        for about, said in find(ranks):
            if about not in self._said and self._speaks:
                log.warning("%s", said)
            self._said.add(about)
        # The same number on all ranks, since it is made from what all of them know.
        step_seconds = max(times.per_step("seconds") for times in ranks) or _SECONDS_BETWEEN
        self._steps_left = max(_STEPS_BETWEEN, math.ceil(_SECONDS_BETWEEN / step_seconds))
        self._ended = time.perf_counter()

    def summary(self) -> dict[str, Any]:
        """`ranks` and `input_share` of all steps so far, JSON. All ranks come here after the same step."""
        self.compare()
        return {"ranks": table(self._total), "input_share": round(input_share(self._total), 4)}
