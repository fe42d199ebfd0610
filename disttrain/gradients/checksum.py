"""Checksums of variables: what ranks compare to find out whether their models have drifted apart."""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf

from disttrain.types import Variable, tf_variable

_INTEGERS = {1: tf.int8, 2: tf.int16, 4: tf.int32, 8: tf.int64}


def checksums(variables: Sequence[Variable]) -> tf.Tensor:
    """int64 [variables]: a sum over the bits of each, every element with another odd factor. Reads each once."""
    return tf.stack([_checksum(tf.convert_to_tensor(tf_variable(v))) for v in variables])


def _checksum(value: tf.Tensor) -> tf.Tensor:
    if value.dtype == tf.bool:
        value = tf.cast(value, tf.int8)
    bits = tf.cast(tf.bitcast(tf.reshape(value, [-1]), _INTEGERS[value.dtype.size]), tf.int64)
    # Odd factors are invertible modulo 2^64, so one changed element always changes the sum.
    return tf.reduce_sum(bits * (2 * tf.range(tf.size(bits, out_type=tf.int64)) + 1))
