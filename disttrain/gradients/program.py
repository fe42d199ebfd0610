"""A `tf.function` that is traced once for batches of any number of examples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf


class Program:
    """Compiles `fn(shares)` for a list of nests of batch tensors; only the first dimension may vary without a new trace.

    Where a later batch differs in another dimension too (longer sequences), that one is left open as well in a second
    trace, so a ragged data set costs two, not one for each length.

    Attributes:
      traces: how often it was traced so far.
    """

    def __init__(self, fn: Callable[[list], Any]):
        self._fn = fn
        self._specs: list[tf.TypeSpec] | None = None
        self._structure: Any = None
        self._compiled: Callable | None = None
        self._seen: set[tuple] = set()
        self.traces = 0

    def __call__(self, shares: list) -> Any:
        leaves = tf.nest.flatten(shares)
        key = tuple((x.shape, x.dtype) for x in leaves)
        if key not in self._seen:
            specs = [_any_count(tf.type_spec_from_value(x)) for x in leaves]
            if not self._takes(shares, specs):
                self._compile(shares, specs)
            self._seen.add(key)
        return self._compiled(shares)

    @property
    def shapes(self) -> int:
        """Number of shapes of batches since the last trace, for each of which XLA compiles what it is to run."""
        return len(self._seen)

    def _takes(self, shares, specs) -> bool:
        if self._compiled is None or not _same_structure(shares, self._structure):
            return False
        return all(new.is_subtype_of(known) for new, known in zip(specs, self._specs, strict=True))

    def _compile(self, shares, specs) -> None:
        if self._compiled is not None and _same_structure(shares, self._structure):
            merged = [
                known.most_specific_common_supertype([new]) for new, known in zip(specs, self._specs, strict=True)
            ]
            specs = [m if m is not None else new for m, new in zip(merged, specs, strict=True)]
        self._seen.clear()
        self._specs, self._structure = specs, tf.nest.map_structure(lambda x: None, shares)
        signature = tf.nest.pack_sequence_as(shares, specs)
        # The one trace itself: a call of the tf.function would look for it each time, which takes 0.3 ms.
        self._compiled = tf.function(self._traced, autograph=False).get_concrete_function(signature)

    def _traced(self, shares):
        self.traces += 1
        return self._fn(shares)


def _any_count(spec: tf.TypeSpec) -> tf.TypeSpec:
    if isinstance(spec, tf.TensorSpec):
        return tf.TensorSpec([None, *spec.shape[1:]], spec.dtype)
    if isinstance(spec, tf.RaggedTensorSpec):
        shape = [None, *spec.shape[1:]]
        return tf.RaggedTensorSpec(shape, spec.dtype, spec.ragged_rank, spec.row_splits_dtype)
    return spec


def _same_structure(left: Any, right: Any) -> bool:
    try:
        tf.nest.assert_same_structure(left, right)
    except (TypeError, ValueError):
        return False
    return True
