"""Global batches whose order follows from the seed and the epoch alone, so that a training can go on from any place."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from disttrain.data.ahead import in_order
from disttrain.data.source import Arrays, Source
from disttrain.errors import DataError
from disttrain.world import cuts


class Batches:
    """Batches of examples; the last one of an epoch may be smaller. Shuffled anew for every epoch.

    Whatever the number of ranks, and whether a training was interrupted or not, batch n of epoch e holds the same examples
    in the same order, and every example is in one batch of an epoch. `comm.distribute` has each rank read its own share only.

    Args:
      source: a nest of arrays [examples, ...] with the same number of examples, or a `Source`: `TFRecords`, `ImageFolder`,
        `Table`, or your own.
      batch_size: global: examples of one optimizer step, over all replicas and micro-batches.
      shuffle: False keeps the order of the source.
      seed: of the shuffling.
      map: (nest of tensors [k, ...]) -> nest of tensors or arrays [k, ...], applied to what is read, in the threads that read
        ahead. A rank without a share calls it with k = 0.

    Raises:
      DataError: arrays that differ in their number of examples, no examples, or a batch size below 1.
    """

    def __init__(
        self,
        source: Any,
        batch_size: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        map: Callable[[Any], Any] | None = None,
    ):
        self.source = source if isinstance(source, Source) else Arrays(source)
        self.examples, self.batch_size = len(self.source), batch_size
        self._shuffle, self._seed, self._map = shuffle, seed, map
        if self.examples == 0:
            raise DataError(f"{type(source).__name__}: the files hold no examples; at least one is wanted")
        if sum(self.source.files) != self.examples:
            raise DataError(
                f"{type(source).__name__}: its files hold {sum(self.source.files)} examples, and its length is "
                f"{self.examples}; the two must be the same"
            )
        if batch_size < 1:
            raise DataError(f"batch_size={batch_size}: a whole number of 1 or more is wanted")

    def epoch(self, number: int) -> Epoch:
        """The batches of an epoch, from 0."""
        return Epoch(self, number, range(len(self)))

    def share(self, rank: int, ranks: int) -> Epoch:
        """Of every batch of the first epoch the rows of one rank."""
        return self.epoch(0).share(rank, ranks)

    @property
    def same_on_all_ranks(self) -> str:
        """What must be the same on all ranks, in words."""
        files = np.asarray(self.source.files, np.int64)
        order = f"shuffled by seed {self._seed}" if self._shuffle else "not shuffled"
        return (
            f"{self.examples} examples in {len(files)} files (sizes {zlib.crc32(files.tobytes()):08x}), "
            f"in batches of {self.batch_size}, {order}"
        )

    def order(self, epoch: int) -> np.ndarray:
        """Numbers of the examples, int64 [examples], one batch after the other."""
        if not self._shuffle:
            return np.arange(self.examples)
        return shuffled(self.source.files, self.batch_size, self._seed, epoch)

    def read(self, places: np.ndarray) -> Any:
        """These examples, as a nest of tensors.

        Raises:
          DataError: the source or `map` returned more or fewer.
        """
        with tf.device("CPU:0"):  # which device gets them is for the communicator to say
            examples = _checked(self.source.read(places), len(places), type(self.source).__name__)
            return _checked(self._map(examples), len(places), "map") if self._map else examples

    def __len__(self) -> int:
        return -(-self.examples // self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.epoch(0))


@dataclasses.dataclass(frozen=True)
class Epoch:
    """The batches of one epoch, some of them, or one rank's rows of them. Nothing is read before one asks for the first."""

    batches: Batches
    number: int
    steps: range
    rank: int = 0
    ranks: int = 1

    def skip(self, count: int) -> Epoch:
        """Without the first `count` batches, which are not read."""
        return dataclasses.replace(self, steps=self.steps[count:])

    def take(self, count: int) -> Epoch:
        """The first `count` batches alone."""
        return dataclasses.replace(self, steps=self.steps[:count])

    def share(self, rank: int, ranks: int) -> Epoch:
        """Of every batch the rows of one rank: consecutive, as many as others have or one more, the first ranks first."""
        return dataclasses.replace(self, rank=rank, ranks=ranks)

    @property
    def same_on_all_ranks(self) -> str:
        """See `Batches`."""
        return self.batches.same_on_all_ranks

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[Any]:
        order, size = self.batches.order(self.number), self.batches.batch_size

        def read(step: int) -> Any:
            batch = order[step * size : (step + 1) * size]
            lo, hi = cuts(len(batch), self.ranks)[self.rank : self.rank + 2]
            return self.batches.read(batch[lo:hi])

        return in_order(read, self.steps)


def shuffled(files: Sequence[int], batch_size: int, seed: int, epoch: int) -> np.ndarray:
    """An order of all examples, int64 [examples], one batch after the other, that depends on these four alone.

    With several files: files in any order, and in each its examples in any order, make one sequence. It is cut into
    `batch_size` pieces, and batch t takes the t-th example of each. Row i of every batch is so from piece i, and whoever
    holds some consecutive rows, as a rank does, reads a consecutive part of the sequence: files of its own where there are
    enough of them, examples of a file where there are not.
    """
    rng = np.random.default_rng([seed, epoch])
    if len(files) == 1:
        return rng.permutation(files[0])
    starts = np.cumsum([0, *files])
    sequence = np.concatenate([starts[file] + rng.permutation(files[file]) for file in rng.permutation(len(files))])
    step, row = np.divmod(np.arange(len(sequence)), batch_size)
    return sequence[np.array(cuts(len(sequence), batch_size))[row] + step]


def _checked(examples: Any, count: int, source: str) -> Any:
    examples = tf.nest.map_structure(lambda x: x if tf.is_tensor(x) else tf.convert_to_tensor(x), examples)
    for leaf in tf.nest.flatten(examples):
        if leaf.shape.rank == 0 or leaf.shape[0] != count:
            raise DataError(
                f"{source} returned a tensor of shape {tuple(leaf.shape)} for {count} examples: its first dimension must be "
                "the examples, none more and none less, or some would be seen twice or never"
            )
    return examples
