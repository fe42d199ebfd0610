"""Looking on."""

from __future__ import annotations

import tensorflow as tf

from disttrain.gradients import sparse
from disttrain.gradients.transforms.state import replica_state
from disttrain.types import name_of


class monitor(tf.Module):
    """Changes nothing and keeps the L2 norm of every gradient. Its place in the list says what it sees."""

    def __init__(self):
        super().__init__(name="monitor")

    def build(self, variables):
        self._names = [name_of(v) for v in variables]
        self._norms = replica_state([0.0] * len(variables), tf.float32, "norms")

    def __call__(self, gradients, variables):
        norms = {name_of(v): g for g, v in zip(gradients, variables, strict=True)}
        zero = tf.constant(0.0)
        self._norms.assign(
            [tf.sqrt(sparse.square_sums([norms[n]])[0]) if norms.get(n) is not None else zero for n in self._names]
        )
        return gradients

    def norms(self) -> dict[str, float]:
        """Name of the variable -> L2 norm of its gradient in the last step that was applied; 0.0 where it had none."""
        return dict(zip(self._names, self._norms.numpy().tolist(), strict=True))
