"""Batch normalization over the examples of all ranks."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from disttrain.errors import ConfigError
from disttrain.horovod.engine import elastic_job, hvd


@keras.saving.register_keras_serializable(package="disttrain")
class SyncBatchNormalization(keras.layers.BatchNormalization):
    """`BatchNormalization` whose mean and variance in training are those of all ranks' examples together.

    Every example counts once, however unevenly ranks share them; masked ones do not count.

    Args:
      fused: False; there is no fused kernel that sums over ranks.
      kwargs: as for `keras.layers.BatchNormalization`.
    """

    def __init__(self, fused: bool | None = False, **kwargs: Any):
        if fused in (True, None):
            raise ConfigError("SyncBatchNormalization does not support fused=True.")
        super().__init__(**kwargs)

    def _moments(self, inputs: tf.Tensor, mask: tf.Tensor | None) -> tuple[tf.Tensor, tf.Tensor]:
        inputs = tf.convert_to_tensor(inputs)
        weights = tf.ones_like(inputs)
        if mask is not None:
            weights *= tf.cast(mask, inputs.dtype)[..., tf.newaxis]
        sums = [tf.reduce_sum(x, self._reduction_axes) for x in (weights, weights * inputs)]
        count, total = tf.unstack(_sum_over_ranks(tf.stack(sums)))
        mean = tf.math.divide_no_nan(total, count)
        # Deviations from the mean of all ranks: squares less the squared mean would lose digits.
        shape = [1] * len(inputs.shape)
        shape[self.axis] = -1
        squares = weights * tf.square(inputs - tf.reshape(mean, shape))
        squares = _sum_over_ranks(tf.reduce_sum(squares, self._reduction_axes))
        return mean, tf.math.divide_no_nan(squares, count)


def _sum_over_ranks(tensor: tf.Tensor) -> tf.Tensor:
    """Horovod's sum, which has a gradient: what a rank puts in is in every rank's sum."""
    return hvd.allreduce(tensor, op=hvd.Sum) if elastic_job() or hvd.size() > 1 else tensor
