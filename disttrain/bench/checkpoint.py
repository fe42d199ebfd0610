"""How long a training is held up while a checkpoint is written in the background.

Steps with a write in progress take turns with steps without, in one process: what disturbs the machine disturbs both.
"""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import keras
import tensorflow as tf

import disttrain as dt
from disttrain.bench.workloads import batch_for
from disttrain.models import transformer

_WARM_UP, _QUIET = 2, 3
_EXAMPLES, _LENGTH = 8, 128


class _Write(NamedTuple):
    """Seconds: of the call of `save`, until all was on the disk, and of each step meanwhile."""

    call: float
    whole: float
    steps: list[float]


def compare_checkpoint(millions: int, saves: int, folder: Path) -> dict[str, Any]:
    """Trains a transformer of so many million parameters with Adam, on 8 x 128 tokens a step, and saves now and then.

    Steps during a write are held against those before it and after it.

    Returns:
      parameters, bytes (of a checkpoint), steps (done during writes), step_ms (median without a write), spread (between its
      quarters, relative), save_ms (median of the call), write_s (median, until all is on the disk), mb_per_s, and as
      multiples of a step: call (of the save), steps_during (extra time of all steps during one write, median over writes),
      held_up (both).
    """
    step, batch = _step(millions)
    one_step = functools.partial(_seconds, step, batch)
    checkpoint = _Timed(folder, keep=1)
    for _ in range(_WARM_UP):
        one_step()
    _write(checkpoint, 0, step, one_step)
    writes, quiet = [], [[one_step() for _ in range(_QUIET)]]
    for number in range(saves):
        writes.append(_write(checkpoint, number + 1, step, one_step))
        quiet.append([one_step() for _ in range(max(_QUIET, len(writes[-1].steps)))])
    lower, step_s, upper = statistics.quantiles(itertools.chain(*quiet), n=4)
    size = sum(path.stat().st_size for path in checkpoint.latest().folder.iterdir())
    call, write_s = (statistics.median(getattr(write, name) for write in writes) for name in ("call", "whole"))
    around = [statistics.median(before + after) for before, after in itertools.pairwise(quiet)]
    extra = [sum(write.steps) - len(write.steps) * usual for write, usual in zip(writes, around, strict=True)]
    ratios = {"call": call / step_s, "steps_during": statistics.median(extra) / step_s}
    return {
        "parameters": step.model.count_params(),
        "bytes": size,
        "steps": sum(len(write.steps) for write in writes),
        "step_ms": 1e3 * step_s,
        "spread": (upper - lower) / step_s,
        "save_ms": 1e3 * call,
        "write_s": write_s,
        "mb_per_s": size / 1e6 / write_s,
        **ratios,
        "held_up": sum(ratios.values()),
    }


def _write(checkpoint: _Timed, number: int, step: dt.TrainStep, one_step: Callable[[], float]) -> _Write:
    start = time.perf_counter()
    checkpoint.save(number, step.state, {})
    call = time.perf_counter() - start
    # At least one: variables get new memory in the first step after a save, be the write over or not.
    steps = [one_step()]
    while checkpoint.writing:
        steps.append(one_step())
    checkpoint.wait()
    return _Write(call, checkpoint.seconds, steps)


class _Timed(dt.Checkpointer):
    """Says whether it is writing, and how many seconds the last write took."""

    seconds = 0.0

    @property
    def writing(self) -> bool:
        return self._writing is not None and self._writing.is_alive()

    def _write(self, *args: Any) -> None:
        start = time.perf_counter()
        super()._write(*args)
        self.seconds = time.perf_counter() - start


def _step(millions: int) -> tuple[dt.TrainStep, Any]:
    # 14 blocks of width 768 for 100 million; a block has 12 width^2 parameters.
    blocks = max(1, round(14 * (millions / 100) ** (1 / 3)))
    width = max(64, 64 * round((1e6 * millions / blocks / 12) ** 0.5 / 64))
    model = transformer(width=width, blocks=blocks)
    step = dt.TrainStep(
        model,
        keras.optimizers.Adam(1e-4),
        loss_fn=dt.losses.sparse_categorical_crossentropy(),
        comm=dt.init("local"),
        jit=False,
    )
    return step, tuple(map(tf.constant, batch_for(model, _EXAMPLES, _LENGTH)))


def _seconds(step: dt.TrainStep, batch: Any) -> float:
    start = time.perf_counter()
    float(step(batch).loss)
    return time.perf_counter() - start
