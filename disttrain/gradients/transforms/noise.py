"""Gradient noise."""

from __future__ import annotations

import tensorflow as tf

from disttrain.errors import ConfigError
from disttrain.gradients import sparse
from disttrain.gradients.transforms.state import replica_state


class add_noise(tf.Module):
    """Adds Gaussian noise to every element, the same on every replica (Neelakantan et al., 2015).

    Args:
      stddev: standard deviation at the first step.
      decay: at step t it is stddev / (1 + t) ** decay. The paper uses 0.55; 0 keeps it constant.
      seed: of the noise, a whole number.
    """

    def __init__(self, stddev: float, decay: float = 0.0, seed: int = 0):
        super().__init__(name="add_noise")
        if stddev < 0:
            raise ConfigError(f"add_noise({stddev!r}): the standard deviation cannot be negative")
        self._stddev, self._decay, self._seed = stddev, decay, seed

    def build(self, variables):
        self._count = replica_state(0, tf.int64, "noise_steps")

    def __call__(self, gradients, variables):
        stddev = self._stddev * (1.0 + tf.cast(self._count, tf.float32)) ** -self._decay
        noisy = []
        for index, (gradient, variable) in enumerate(zip(gradients, variables, strict=True)):
            seed = tf.stack([tf.constant(self._seed + (index << 32), tf.int64), self._count.read_value()])
            noisy.append(None if gradient is None else self._add(sparse.densify(gradient, variable), stddev, seed))
        self._count.assign_add(1)
        return noisy

    @staticmethod
    def _add(gradient, stddev, seed):
        noise = tf.random.stateless_normal(gradient.shape, seed)
        return gradient + tf.cast(stddev * noise, gradient.dtype)
