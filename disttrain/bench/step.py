"""`TrainStep` against the loop that one would write by hand, in one process or in several."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

import disttrain as dt
from disttrain.bench.launch import run_ranks
from disttrain.bench.workloads import WORKLOADS, batch_for
from disttrain.comm import Communicator

_WARM_UP = 3
# Enough steps for jit="auto" to have tried both ways and chosen.
_WARM_UP_AUTO = 12
# They take turns, so that nothing that depends on a batch is found ready-made.
_BATCHES = 4


def compare_step(name: str, rounds: int, comm: Communicator | None = None) -> Iterator[dict[str, Any]]:
    """Times both, taking turns, with the same jit setting; and jit="auto" against the loop without XLA.

    The ratio is the median of the rounds' own ratios: what disturbs the machine for a while disturbs both.

    Args:
      comm: of the process that asks; default: one process. With several, by hand means `hvd.allreduce` of each gradient,
        and each round counts the time of the slowest rank.
    """
    comm = comm or dt.init("local")
    make_model, examples = WORKLOADS[name]
    seeds = range(comm.rank * _BATCHES, (comm.rank + 1) * _BATCHES)
    batches = [tuple(map(tf.constant, batch_for(make_model(), examples, seed=seed))) for seed in seeds]
    for label, jit, hand_jit in (("False", False, False), ("True", True, True), ("auto", "auto", False)):
        step = _explicit_step(make_model(), jit, comm)
        hand = _hand_written_step(make_model(), hand_jit, comm)
        for i in range(_WARM_UP_AUTO if jit == "auto" else _WARM_UP):
            step(batches[i % _BATCHES])
        for i in range(_WARM_UP):
            hand(batches[i % _BATCHES])
        pairs = [_time_pair(hand, step, batches[i % _BATCHES], comm, swap=i % 2 == 1) for i in range(rounds)]
        slowest = [list(map(max, zip(*pair, strict=True))) for pair in zip(*comm.all_gather_object(pairs), strict=True)]
        hand_times, our_times = zip(*slowest, strict=True)
        yield {
            "model": name,
            "engine": comm.name,
            "ranks": comm.size,
            "jit": label,
            "hand_jit": hand_jit,
            "hand_ms": 1e3 * statistics.median(hand_times),
            "ours_ms": 1e3 * statistics.median(our_times),
            "ratio": statistics.median(ours / by_hand for by_hand, ours in slowest),
        }


def compare_step_on(engine: str, ranks: int, name: str, rounds: int, folder: Path) -> list[dict[str, Any]]:
    """`compare_step` in several processes under mpirun.

    Raises:
      BackendError: there is no mpirun, or a rank failed.
    """
    result = folder / "step-ranks.json"
    run_ranks(ranks, "disttrain.bench.step", [str(result), engine, name, str(rounds)])
    return json.loads(result.read_text())


def _main(result: str, engine: str, name: str, rounds: str) -> None:
    comm = dt.init(engine)
    rows = list(compare_step(name, int(rounds), comm))
    if comm.is_chief:
        Path(result).write_text(json.dumps(rows))
    comm.close()


def _time_pair(hand: Callable, ours: Callable, batch: Any, comm: Communicator, *, swap: bool) -> tuple[float, float]:
    first, second = (ours, hand) if swap else (hand, ours)
    comm.barrier()
    times = _seconds(first, batch), _seconds(second, batch)
    return times[::-1] if swap else times


def _seconds(step: Callable, batch: Any) -> float:
    start = time.perf_counter()
    step(batch)
    return time.perf_counter() - start


def _explicit_step(model: keras.Model, jit: bool | str, comm: Communicator) -> Callable[[Any], float]:
    loss_fn = dt.losses.sparse_categorical_crossentropy()
    step = dt.TrainStep(model, keras.optimizers.Adam(1e-3), loss_fn=loss_fn, comm=comm, jit=jit)
    return lambda batch: float(step(batch).loss)


def _hand_written_step(model: keras.Model, jit: bool, comm: Communicator) -> Callable[[Any], float]:
    optimizer = keras.optimizers.Adam(1e-3)
    optimizer.build(model.trainable_variables)
    average = _average_by_hand(comm)

    def loss_and_gradients(x, y):
        with tf.GradientTape() as tape:
            losses = keras.losses.sparse_categorical_crossentropy(y, model(x, training=True), from_logits=True)
            loss = tf.reduce_mean(losses)
        return loss, tape.gradient(loss, [v.value for v in model.trainable_variables])

    if jit:
        loss_and_gradients = tf.function(loss_and_gradients, jit_compile=True, autograph=False)

    @tf.function(autograph=False)
    def step(x, y):
        loss, gradients = loss_and_gradients(x, y)
        optimizer.apply_gradients(zip(map(average, gradients), model.trainable_variables, strict=True))
        return loss

    return lambda batch: float(step(*batch))


def _average_by_hand(comm: Communicator) -> Callable:
    if comm.size == 1:
        return lambda gradient: gradient
    import horovod.tensorflow as hvd

    hvd.init()
    return hvd.allreduce


if __name__ == "__main__":
    _main(*sys.argv[1:])
