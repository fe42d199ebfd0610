"""Precision."""

from __future__ import annotations

import tensorflow as tf

from disttrain.gradients import sparse
from disttrain.gradients.transforms.chain import Transform


def cast(dtype: str | tf.DType) -> Transform:
    """Rounds gradients to `dtype`. The step casts them back to the variable's dtype before it applies them.

    Among `before_reduce`, the all-reduce then carries that dtype.
    """
    dtype = tf.as_dtype(dtype)
    return lambda gradients, variables: [sparse.map_values(lambda x: tf.cast(x, dtype), g) for g in gradients]
