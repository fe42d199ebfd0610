"""What `Batches` reads from: examples by their number, in any order, by several threads at once.

As in Grain (google/grain, `RandomAccessDataSource`): where an example can be read by its number, the order of an epoch is an
order of numbers. It can be drawn before anything is read, divided among ranks, and entered at any place.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from glob import glob
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import tensorflow as tf

from disttrain.errors import DataError

Paths: TypeAlias = str | os.PathLike | Iterable[str | os.PathLike]


@runtime_checkable
class Source(Protocol):
    """Examples, numbered from 0. Anything that has these three is one.

    Attributes:
      files: number of examples in each file, in the order of their numbers; [len(self)] where files do not matter. With
        several, a rank reads consecutive pieces of few files.
    """

    files: Sequence[int]

    def __len__(self) -> int: ...

    def read(self, places: np.ndarray) -> Any:
        """A nest of arrays or tensors [k, ...], the examples with these numbers, in their order.

        Called by several threads at once. Without places it returns the same shapes and dtypes, with k = 0.

        Args:
          places: int64 [k].
        """


class Arrays:
    """A nest of arrays [examples, ...]. They stay what they are: of one on disk (`np.load(..., mmap_mode="r")`) only what is
    asked for is read.

    Raises:
      DataError: they differ in their number of examples.
    """

    def __init__(self, columns: Any):
        self._columns = tf.nest.map_structure(np.asanyarray, columns)
        counts = {len(column) for column in tf.nest.flatten(self._columns)}
        if len(counts) != 1 or 0 in counts:
            raise DataError(
                f"the arrays of a data set hold {sorted(counts)} examples; the same number, above zero, is wanted"
            )
        self.files = list(counts)

    def __len__(self) -> int:
        return self.files[0]

    def read(self, places: np.ndarray) -> Any:
        return tf.nest.map_structure(lambda column: column[places], self._columns)


def find(paths: Paths) -> list[Path]:
    """Files by name or by pattern ("data/*.csv"; `**` for folders in folders), those of a pattern sorted.

    Raises:
      DataError: a name or a pattern without a file, or a file that is named twice.
    """
    found: list[Path] = []
    for wanted in [paths] if isinstance(paths, str | os.PathLike) else paths:
        wanted = os.fspath(wanted)
        names = [wanted] if os.path.isfile(wanted) else sorted(filter(os.path.isfile, glob(wanted, recursive=True)))
        if not names:
            raise DataError(f"there is no file {wanted} in {os.getcwd()}: give files, or a pattern that some match")
        found += map(Path, names)
    twice = [path for path, count in Counter(found).items() if count > 1]
    if twice or not found:
        raise DataError(f"{twice[0]} is named twice: its examples would be seen twice" if twice else "no file is named")
    return found
