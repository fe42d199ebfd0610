"""How long a training is held up while a checkpoint is written in the background.

Steps with a write in progress take turns with steps without, in one process: what disturbs the machine disturbs both.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

import disttrain as dt
from disttrain.bench.workloads import batch_for
from disttrain.models import transformer

_WARM_UP = 2
_BLOCKS = 14
_EXAMPLES, _LENGTH = 8, 128


def compare_checkpoint(millions: int, saves: int, folder: Path) -> dict[str, Any]:
    """Trains a transformer of so many million parameters with Adam, on 8 x 128 tokens a step, and saves now and then.

    Before each save, as many steps are timed as were done during the write before.

    Returns:
      parameters, bytes (of a checkpoint), steps (done during writes), step_ms (median without a write), save_ms (median of
      the call), write_s (median, from the call until all is on the disk), mb_per_s, and as multiples of a step: call (of the
      save), steps_during (extra time of all steps during one write), held_up (both).
    """
    step, batch = _step(millions)
    checkpoint = _Timed(folder, keep=1)
    for _ in range(_WARM_UP):
        _seconds(step, batch)
    calls, writes, alone, extra, during = [], [], [], [], 0
    count = 3
    for number in range(saves + 1):  # the first one warms up
        quiet = [_seconds(step, batch) for _ in range(count)]
        start = time.perf_counter()
        checkpoint.save(number, step.state, {})
        call = time.perf_counter() - start
        busy = []
        while checkpoint.writing:
            busy.append(_seconds(step, batch))
        # TensorFlow gives the variables new memory in the first step after a save, be the write over or not.
        busy = busy or [_seconds(step, batch)]
        checkpoint.wait()
        count = max(3, len(busy))
        if number:
            alone += quiet
            calls.append(call)
            writes.append(checkpoint.seconds)
            extra.append(sum(busy) - len(busy) * statistics.median(quiet))
            during += len(busy)
    one = statistics.median(alone)
    size = sum(path.stat().st_size for path in checkpoint.latest().folder.iterdir())
    ratios = {"call": statistics.median(calls) / one, "steps_during": statistics.median(extra) / one}
    return {
        "parameters": sum(v.shape.num_elements() for v in map(tf.convert_to_tensor, step.model.trainable_variables)),
        "bytes": size,
        "steps": during,
        "step_ms": 1e3 * one,
        "save_ms": 1e3 * statistics.median(calls),
        "write_s": statistics.median(writes),
        "mb_per_s": size / 1e6 / statistics.median(writes),
        **ratios,
        "held_up": sum(ratios.values()),
    }


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
    width = max(64, 64 * round((1e6 * millions / _BLOCKS / 12) ** 0.5 / 64))
    model = transformer(width=width, blocks=_BLOCKS)
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
