"""How a batch is cut into shares, one for each replica."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import tensorflow as tf

from disttrain.comm.pipeline import check_seeds
from disttrain.errors import DataError
from disttrain.world import cuts


class DistributedBatches:
    """Global batches on their way to the replicas; can be iterated again for every epoch.

    Args:
      dataset: a `tf.data.Dataset` or any iterable of batches (nests of tensors or arrays).
      deal: turns one global batch into what the step takes.
    """

    def __init__(self, dataset: Iterable, deal: Callable[[Any], Any]):
        self._dataset = dataset.prefetch(tf.data.AUTOTUNE) if isinstance(dataset, tf.data.Dataset) else dataset
        self._deal = deal

    def __iter__(self) -> Iterator[Any]:
        return map(self._deal, self._dataset)

    def __len__(self) -> int:
        return len(self._dataset)


def distribute(dataset: Iterable, rank: int, size: int) -> DistributedBatches:
    """Of every global batch the share of one rank. A data set that has `share(rank, size)` reads no more than that.

    Raises:
      DataError: each of several ranks would have its batches in another order.
    """
    if hasattr(dataset, "share"):
        return DistributedBatches(dataset.share(rank, size), lambda batch: split(batch, 1)[0])
    if size > 1:
        check_seeds(dataset)
    return DistributedBatches(dataset, lambda batch: split(batch, size)[rank])


def as_tensors(batch: Any) -> Any:
    """The batch with every leaf a tensor (or a composite tensor, left as it is)."""
    return tf.nest.map_structure(lambda x: x if tf.is_tensor(x) else tf.convert_to_tensor(x), batch)


def count_examples(batch: Any) -> int:
    """Number of examples in an eager batch.

    Raises:
      DataError: a batch without tensors, a scalar in it, or first dimensions that differ.
    """
    leaves = tf.nest.flatten(batch)
    if not leaves:
        raise DataError("the batch holds no tensors")
    for leaf in leaves:
        if isinstance(leaf, tf.SparseTensor):
            raise DataError(
                "the batch holds a SparseTensor, which cannot be shared out; use a RaggedTensor or a dense one"
            )
        if leaf.shape.rank == 0:
            raise DataError("the batch holds a scalar; every tensor of a batch needs a first dimension of examples")
    counts = [int(leaf.shape[0]) for leaf in leaves]
    if len(set(counts)) > 1:
        shapes = ", ".join(str(tuple(leaf.shape)) for leaf in leaves)
        raise DataError(f"the tensors of a batch differ in their number of examples: shapes {shapes}")
    return counts[0]


def split(batch: Any, parts: int) -> list[Any]:
    """Cuts a batch into `parts` consecutive shares whose sizes differ by one at most, the larger ones first."""
    batch = as_tensors(batch)
    bounds = cuts(count_examples(batch), parts)
    if parts == 1:
        return [batch]
    return [tf.nest.map_structure(lambda x, lo=lo, hi=hi: x[lo:hi], batch) for lo, hi in itertools.pairwise(bounds)]
