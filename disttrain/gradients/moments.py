"""Synchronized BatchNormalization: moments over the examples of all replicas.

Keras's layer asks `tf.distribute` to add up sums, squares and counts. That knows nothing of Horovod or MPI, and a layer
with `synchronized=True` would there silently normalize each rank by itself. So the layer is given our all-reduce.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence

import keras.src.backend.tensorflow.nn as keras_nn
import tensorflow as tf

AllReduce = Callable[[Sequence[tf.Tensor]], list[tf.Tensor]]

_original = keras_nn._compute_moments_sync


class _Current(threading.local):
    """Replicas of one process are traced in threads that take turns, so each has its own."""

    all_reduce: AllReduce | None = None
    present: tf.Tensor | float = 1.0


_current = _Current()
_everywhere: list[AllReduce] = []


@contextlib.contextmanager
def synchronized(all_reduce: AllReduce, present: tf.Tensor | float = 1.0) -> Iterator[None]:
    """Within it, layers with `synchronized=True` take their moments over all replicas that `all_reduce` sums over.

    `present` is 0 where this replica's examples are to count nothing, else 1.
    """
    before = _current.all_reduce, _current.present
    _current.all_reduce, _current.present = all_reduce, present
    try:
        yield
    finally:
        _current.all_reduce, _current.present = before


def install(all_reduce: AllReduce) -> None:
    """The same from now on and for the whole process, for Keras's own `fit`."""
    _everywhere[:] = [all_reduce]


def _compute_moments_sync(x: tf.Tensor, axes: Sequence[int], keepdims: bool) -> tuple[tf.Tensor, tf.Tensor]:
    """Mean and variance of `x` over `axes` and all replicas, each example with the same weight."""
    all_reduce = _current.all_reduce or (_everywhere[0] if _everywhere else None)
    if all_reduce is None:
        return _original(x, axes, keepdims)
    total = tf.reduce_sum(x, axes, keepdims=True)
    squares = tf.reduce_sum(tf.square(x), axes, keepdims=True)
    count = tf.cast(tf.reduce_prod(tf.gather(tf.shape(x), axes)), x.dtype)
    present = tf.cast(_current.present, x.dtype)
    mine = [tf.math.multiply_no_nan(s, present) for s in (total, squares, count)]
    total, squares, count = summed(all_reduce, *mine)
    mean = tf.math.divide_no_nan(total, count)
    variance = tf.maximum(tf.math.divide_no_nan(squares, count) - tf.square(mean), 0.0)
    return (mean, variance) if keepdims else (tf.squeeze(mean, axes), tf.squeeze(variance, axes))


def summed(all_reduce: AllReduce, *tensors: tf.Tensor) -> list[tf.Tensor]:
    """Sums over replicas, with a gradient: each replica's input is in every replica's sum, so gradients are summed, too."""

    @tf.custom_gradient
    def total(*tensors):
        return all_reduce(tensors), lambda *upstream: all_reduce(upstream)

    return total(*tensors)


keras_nn._compute_moments_sync = _compute_moments_sync
