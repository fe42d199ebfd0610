"""How tensors travel between processes: in buckets, narrowed where asked for, rows apart from dense tensors.

A bucket leaves as soon as its own tensors exist, while the backward pass is still at work on the others (Li et al.,
PyTorch Distributed, VLDB 2020). The last tensors of the list go first: those are the gradients of the last layers,
which the backward pass computes first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import tensorflow as tf

from disttrain.errors import ConfigError

MIB = 1 << 20

# Elements from which a tensor is worth narrowing. Smaller ones, the weight and the metrics among them, stay exact.
_WORTH_NARROWING = 1 << 14

_WIRE_DTYPES = {None: None, "float32": None, "float16": tf.float16, "bfloat16": tf.bfloat16}


@dataclasses.dataclass(frozen=True)
class Wire:
    """How tensors are packed for the way.

    Attributes:
      bucket_mib: size of a bucket in MiB; a larger tensor is a bucket of its own.
      wire_dtype: None (as they are), "float16" or "bfloat16": what large float32 tensors are cast to on the way.

    Raises:
      ConfigError: an unknown dtype, or a size that is not above zero.
    """

    bucket_mib: float = 25
    wire_dtype: str | None = None

    def __post_init__(self):
        if self.wire_dtype not in _WIRE_DTYPES:
            raise ConfigError(f"wire_dtype={self.wire_dtype!r}: use None, 'float16' or 'bfloat16'")
        if not self.bucket_mib > 0:
            raise ConfigError(f"bucket_mib={self.bucket_mib!r}: must be above zero")


class Engine(Protocol):
    """The few things that an engine of many processes does by itself; all ranks call them in the same order."""

    size: int

    def start(self, tensors: list[tf.Tensor], op: str) -> Any:
        """Begins to reduce tensors of one dtype over all ranks, does not wait, and returns a handle."""

    def finish(self, handle: Any) -> list[tf.Tensor]:
        """Waits for what `start` began."""

    def all_gather(self, tensor: tf.Tensor) -> tf.Tensor:
        """As in `Communicator`."""


def all_reduce(engine: Engine, wire: Wire, tensors: Sequence, op: str) -> list:
    """Reduces tensors and IndexedSlices over ranks; see `Communicator.all_reduce`."""
    # What holds no elements stays here: there is nothing to add up, and TensorFlow's own collectives crash on it.
    results: list = list(tensors)
    dense = [i for i, x in enumerate(tensors) if not isinstance(x, tf.IndexedSlices) and x.shape.num_elements() != 0]
    started = []
    for bucket in plan([tensors[i] for i in dense], round(wire.bucket_mib * MIB)):
        places = [dense[i] for i in bucket]
        narrow = _WIRE_DTYPES[wire.wire_dtype] if op in ("sum", "mean") else None
        started.append((places, _send(engine, narrow, [tensors[i] for i in places], op)))
    for i, x in enumerate(tensors):
        if isinstance(x, tf.IndexedSlices):
            results[i] = _gather_rows(engine, x, op)
    for places, receive in started:
        for i, x in zip(places, receive(), strict=True):
            results[i] = x
    return results


def plan(tensors: Sequence[tf.Tensor], limit: int) -> list[list[int]]:
    """Places of the tensors of each bucket: from the last to the first, of one dtype, at most `limit` bytes together."""
    buckets: list[list[int]] = []
    room, dtype = 0, None
    for i in reversed(range(len(tensors))):
        needed = (tensors[i].shape.num_elements() or 0) * tensors[i].dtype.size
        if not buckets or tensors[i].dtype != dtype or needed > room:
            buckets.append([])
            room, dtype = limit, tensors[i].dtype
        buckets[-1].append(i)
        room -= needed
    return buckets


def _send(engine: Engine, narrow: tf.DType | None, tensors: list, op: str) -> Callable[[], list]:
    """Sends one bucket on its way; what it returns waits for it."""
    dtype = tensors[0].dtype
    if dtype in (tf.float16, tf.bfloat16):
        # Sums of half precision overflow and round; on the way they have room.
        handle = engine.start([tf.cast(x, tf.float32) for x in tensors], op)
        return lambda: [tf.cast(x, dtype) for x in engine.finish(handle)]
    if dtype.is_integer and op == "mean":
        # Engines differ in how they divide whole numbers; this is as `tf.reduce_mean` does.
        handle = engine.start(tensors, "sum")
        return lambda: [tf.truncatediv(x, tf.constant(engine.size, dtype)) for x in engine.finish(handle)]
    large = [dtype == tf.float32 and (x.shape.num_elements() or 0) >= _WORTH_NARROWING for x in tensors]
    if narrow is None or not any(large):
        handle = engine.start(tensors, op)
        return lambda: engine.finish(handle)

    wide = [x for x, yes in zip(tensors, large, strict=True) if not yes]
    thin = [x for x, yes in zip(tensors, large, strict=True) if yes]
    scales = _agreed_scales(engine, thin) if narrow == tf.float16 else [1.0] * len(thin)
    thin_handle = engine.start([tf.cast(x * s, narrow) for x, s in zip(thin, scales, strict=True)], "sum")
    wide_handle = engine.start(wide, op) if wide else None

    def receive():
        factor = 1.0 / engine.size if op == "mean" else 1.0
        reduced = engine.finish(thin_handle)
        reduced = iter([tf.cast(x, tf.float32) * (factor / s) for x, s in zip(reduced, scales, strict=True)])
        exact = iter(engine.finish(wide_handle) if wide else [])
        return [next(reduced) if yes else next(exact) for yes in large]

    return receive


def _agreed_scales(engine: Engine, tensors: list) -> list[tf.Tensor]:
    """For each tensor a power of two that brings its largest element on any rank to 1/size of float16's range.

    So the sum of all ranks is in range as well, and scaling loses no bit.
    """
    largest = tf.stack([tf.reduce_max(tf.abs(x)) for x in tensors])
    # A maximum with NaN depends on the order of its arguments, so ranks could disagree on it.
    largest = tf.where(tf.math.is_finite(largest), largest, float("inf"))
    (largest,) = engine.finish(engine.start([largest], "max"))
    # Half of the range, since rounding to float16 and the sum may go up by an ulp each.
    exponent = tf.floor(tf.math.log(tf.float16.max / 2 / engine.size / largest) / tf.math.log(2.0))
    # Zeros and non-finite values pass as they are: no scale helps them, and NaN must arrive as NaN.
    scales = tf.where((largest > 0) & tf.math.is_finite(largest), 2.0 ** tf.clip_by_value(exponent, -120.0, 120.0), 1.0)
    return tf.unstack(scales, len(tensors))


def _gather_rows(engine: Engine, slices: tf.IndexedSlices, op: str) -> tf.IndexedSlices:
    if op not in ("sum", "mean"):
        raise ConfigError(f"all_reduce of IndexedSlices: op {op!r} is not known, use 'sum' or 'mean'")
    # Each row once: a word that occurs a thousand times in a batch travels as one row.
    indices, position = tf.unique(slices.indices)
    values = tf.math.unsorted_segment_sum(slices.values, position, tf.size(indices))
    values, indices = engine.all_gather(values), engine.all_gather(indices)
    return tf.IndexedSlices(values / engine.size if op == "mean" else values, indices, slices.dense_shape)
