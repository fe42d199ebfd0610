"""`TrainStep` against the loop that one would write by hand."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf

import disttrain as dt
from disttrain.bench.workloads import WORKLOADS, batch_for

_WARM_UP = 3
# Enough steps for jit="auto" to have tried both ways and chosen.
_WARM_UP_AUTO = 12


def compare_step(name: str, rounds: int) -> Iterator[dict[str, Any]]:
    """Times both, taking turns on one batch, with the same jit setting; and jit="auto" against the loop without XLA.

    The ratio is the median of the rounds' own ratios: what disturbs the machine for a while disturbs both.
    """
    make_model, examples = WORKLOADS[name]
    batch = tuple(map(tf.constant, batch_for(make_model(), examples)))
    for label, jit, hand_jit in (("False", False, False), ("True", True, True), ("auto", "auto", False)):
        step = _explicit_step(make_model(), jit)
        hand = _hand_written_step(make_model(), hand_jit)
        for _ in range(_WARM_UP_AUTO if jit == "auto" else _WARM_UP):
            step(batch)
        for _ in range(_WARM_UP):
            hand(batch)
        pairs = [_time_pair(hand, step, batch, swap=i % 2 == 1) for i in range(rounds)]
        hand_times, our_times = zip(*pairs, strict=True)
        yield {
            "model": name,
            "jit": label,
            "hand_jit": hand_jit,
            "hand_ms": 1e3 * statistics.median(hand_times),
            "ours_ms": 1e3 * statistics.median(our_times),
            "ratio": statistics.median(ours / by_hand for by_hand, ours in pairs),
        }


def _time_pair(hand: Callable, ours: Callable, batch: Any, *, swap: bool) -> tuple[float, float]:
    first, second = (ours, hand) if swap else (hand, ours)
    times = _seconds(first, batch), _seconds(second, batch)
    return times[::-1] if swap else times


def _seconds(step: Callable, batch: Any) -> float:
    start = time.perf_counter()
    step(batch)
    return time.perf_counter() - start


def _explicit_step(model: keras.Model, jit: bool | str) -> Callable[[Any], float]:
    loss_fn = dt.losses.sparse_categorical_crossentropy()
    step = dt.TrainStep(model, keras.optimizers.Adam(1e-3), loss_fn=loss_fn, comm=dt.init("local"), jit=jit)
    return lambda batch: float(step(batch).loss)


def _hand_written_step(model: keras.Model, jit: bool) -> Callable[[Any], float]:
    optimizer = keras.optimizers.Adam(1e-3)
    optimizer.build(model.trainable_variables)

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
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return loss

    return lambda batch: float(step(*batch))
