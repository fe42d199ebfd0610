"""Global batches whose order follows from the seed and the epoch alone, so that a training can go on from any place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from disttrain.errors import DataError


class Batches:
    """Batches of arrays; the last one of an epoch may be smaller. Shuffled anew for every epoch.

    Whatever the number of ranks, and whether a training was interrupted or not, batch n of epoch e holds the same examples.

    Args:
      columns: a nest of arrays [examples, ...] with the same number of examples.
      batch_size: global: examples of one optimizer step, over all replicas and micro-batches.
      shuffle: False keeps the order of the arrays.
      seed: of the shuffling.

    Raises:
      DataError: arrays that differ in their number of examples, or none.
    """

    def __init__(self, columns: Any, batch_size: int, *, shuffle: bool = True, seed: int = 0):
        counts = {len(column) for column in tf.nest.flatten(columns)}
        if len(counts) != 1 or 0 in counts:
            raise DataError(
                f"the arrays of a data set hold {sorted(counts)} examples; the same number, above zero, is wanted"
            )
        (self.examples,) = counts
        self.batch_size, self._shuffle, self._seed = batch_size, shuffle, seed
        self._columns = tf.nest.map_structure(tf.convert_to_tensor, columns)

    def epoch(self, number: int) -> tf.data.Dataset:
        """The batches of an epoch, from 0."""
        order = np.arange(self.examples)
        if self._shuffle:
            order = np.random.default_rng([self._seed, number]).permutation(self.examples)
        rows = tf.data.Dataset.from_tensor_slices(order).batch(self.batch_size)
        take = lambda places: tf.nest.map_structure(lambda column: tf.gather(column, places), self._columns)  # noqa: E731
        return rows.map(take, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)

    def __len__(self) -> int:
        return -(-self.examples // self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.epoch(0))
