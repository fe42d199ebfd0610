"""What a `tf.data` pipeline tells of the order of its examples. Every process makes this order by itself."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import tensorflow as tf

from disttrain.errors import DataError


class Shuffle(NamedTuple):
    """A shuffle in a pipeline.

    Attributes:
      seeds: zeros where they are drawn by chance.
      again: whether every iteration has another order.
    """

    seeds: tuple[int, int]
    again: bool


def shuffles(dataset: Iterable) -> list[Shuffle]:
    """Those of a pipeline; none of any other data set. Within a function of the pipeline (of `interleave`) they are not seen."""
    if not isinstance(dataset, tf.data.Dataset):
        return []
    # Private to TensorFlow. The public way, by the pipeline's graph, makes a copy of all arrays in it.
    found = [shuffle for before in dataset._inputs() for shuffle in shuffles(before)]
    if type(dataset).__name__ == "_ShuffleDataset":
        seeds = int(dataset._seed), int(dataset._seed2)
        found.append(Shuffle(seeds, bool(dataset._reshuffle_each_iteration)))
    return found


def described(dataset: Iterable) -> str | None:
    """What must be the same on all ranks, in words; None where nothing is known."""
    seeds = [shuffle.seeds for shuffle in shuffles(dataset)]
    return f"a tf.data pipeline shuffled by {', '.join(map(str, seeds))}" if seeds else None


def check_seeds(dataset: Iterable) -> None:
    """Raises `DataError` where every process would have an order of its own."""
    if any(shuffle.seeds == (0, 0) for shuffle in shuffles(dataset)):
        raise DataError(
            "the data set is shuffled without a seed: every rank would have an order of its own, and examples would be lost and "
            "repeated. Give `shuffle` a seed, and `list_files`, which shuffles unless it is told not to; or call "
            "keras.utils.set_random_seed before they are made"
        )


def shuffles_again(dataset: Iterable) -> bool:
    """Whether its order depends on how often it was iterated, which a new process cannot know."""
    return any(shuffle.again for shuffle in shuffles(dataset))
