"""What a `tf.data` pipeline tells of the order of its examples. Every process makes this order by itself."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import tensorflow as tf

from disttrain.errors import DataError

# Stages that go through what is before them once in each iteration. Others do so more often, such as `repeat`.
_ONCE = frozenset(
    f"_{name}Dataset"
    for name in (
        *("AssertCardinality", "Batch", "Concatenate", "DenseToRagged", "Filter", "FlatMap", "GroupByWindow"),
        *("IgnoreErrors", "Interleave", "Map", "Options", "PaddedBatch", "ParallelBatch", "ParallelInterleave"),
        *("ParallelMap", "Prefetch", "Rebatch", "Restructured", "Scan", "Shard", "Skip", "Take"),
        *("TakeWhile", "Unbatch", "Unique", "Window", "Zip"),
    )
)

# Stages that draw by chance, and what says whether they do so anew in each iteration.
_DRAWS = {"_ShuffleDataset": "_reshuffle_each_iteration", "_RandomDataset": "_rerandomize"}


class Shuffle(NamedTuple):
    """A shuffle in a pipeline, or numbers drawn by chance: `sample_from_datasets` goes by them.

    Attributes:
      stage: the pipeline up to it.
      seeds: zeros where they are drawn by chance.
      again: whether every iteration of it has another order.
      times: how often an iteration of the pipeline iterates it; 0 where the first does so and a cache keeps what it has
        found, None where this cannot be told.
    """

    stage: tf.data.Dataset
    seeds: tuple[int, int]
    again: bool
    times: int | None


def shuffles(dataset: Iterable, times: int | None = 1) -> list[Shuffle]:
    """Those of a pipeline; none of any other data set. Within a function of the pipeline (of `interleave`) they are not seen."""
    if not isinstance(dataset, tf.data.Dataset):
        return []
    name = type(dataset).__name__
    found = []
    # Private to TensorFlow. The public way, by the pipeline's graph, makes a copy of all arrays in it.
    if name in _DRAWS:
        seeds = int(dataset._seed), int(dataset._seed2)
        counted = times if name == "_ShuffleDataset" else None
        found = [Shuffle(dataset, seeds, bool(getattr(dataset, _DRAWS[name])), counted)]
    elif name == "CacheDataset":
        times = 0
    elif name not in _ONCE and times != 0:
        times = None
    return [shuffle for before in dataset._inputs() for shuffle in shuffles(before, times)] + found


def described(dataset: Iterable) -> str | None:
    """What must be the same on all ranks, in words; None where nothing is known."""
    seeds = [shuffle.seeds for shuffle in shuffles(dataset)]
    return f"a tf.data pipeline shuffled by {', '.join(map(str, seeds))}" if seeds else None


def check_seeds(dataset: Iterable) -> None:
    """Raises `DataError` where every process would have an order of its own."""
    if drawn_by_chance(dataset):
        raise DataError(
            "the data set is shuffled without a seed: every rank would have an order of its own, and examples would be lost and "
            "repeated. Give `shuffle` a seed, and `list_files`, which shuffles unless it is told not to; or call "
            "keras.utils.set_random_seed before they are made"
        )


def drawn_by_chance(dataset: Iterable) -> bool:
    """Whether its order is another one in every process."""
    return any(shuffle.seeds == (0, 0) for shuffle in shuffles(dataset))


def shuffles_again(dataset: Iterable) -> bool:
    """Whether its order depends on how often it was iterated."""
    return any(shuffle.again for shuffle in shuffles(dataset))


def pass_over(dataset: Iterable, iterations: int) -> None:
    """Goes on to the order of a later iteration, reading nothing: a shuffle draws its order when an iterator is made.

    Exact where `can_pass_over` says so. What is before a shuffle has no iterator before that is read from, so that each
    shuffle counts for itself.
    """
    for shuffle in shuffles(dataset):
        if shuffle.again:
            for _ in range(iterations * (shuffle.times or 0)):
                iter(shuffle.stage)


def can_pass_over(dataset: Iterable) -> bool:
    """Whether it can be told how often an iteration of the pipeline iterates each shuffle that counts."""
    return all(shuffle.times is not None or not shuffle.again for shuffle in shuffles(dataset))
