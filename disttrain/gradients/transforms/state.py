"""State of transforms."""

from __future__ import annotations

from typing import Any

import tensorflow as tf


def replica_state(value: Any, dtype: tf.DType, name: str) -> tf.Variable:
    """State that each replica updates by itself, from the same gradients and so in the same way."""
    return tf.Variable(
        value,
        trainable=False,
        dtype=dtype,
        name=name,
        synchronization=tf.VariableSynchronization.ON_READ,
        aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
    )
