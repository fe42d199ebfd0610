"""Dynamic loss scaling for float16 (Micikevicius et al., Mixed Precision Training, 2018)."""

from __future__ import annotations

import tensorflow as tf


class LossScale(tf.Module):
    """A factor that keeps small float16 gradients from becoming zero; found by trial, the same on all replicas.

    Args:
      initial: first scale, a power of two, so that scaling and unscaling are exact.
      growth_steps: the scale doubles after so many steps in a row with finite gradients.
    """

    def __init__(self, initial: float = 2.0**15, growth_steps: int = 2000):
        super().__init__(name="loss_scale")
        self.growth_steps = growth_steps
        self.scale = tf.Variable(initial, trainable=False, dtype=tf.float32, name="scale")
        self.good_steps = tf.Variable(0, trainable=False, dtype=tf.int64, name="good_steps")

    def update(self, finite: tf.Tensor) -> None:
        """Halves the scale (down to 1) where gradients were not finite; else counts, and doubles it in time.

        Args:
          finite: bool scalar, agreed by all replicas.
        """
        good = tf.where(finite, self.good_steps + 1, 0)
        grow = good >= self.growth_steps
        change = tf.where(finite, tf.where(grow, 2.0, 1.0), 0.5)
        doubled = tf.maximum(self.scale * change, 1.0)
        self.scale.assign(tf.where(tf.math.is_finite(doubled), doubled, self.scale))
        self.good_steps.assign(tf.where(grow, tf.zeros_like(good), good))
