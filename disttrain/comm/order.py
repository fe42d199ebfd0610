"""The order of collectives in a program, which must be the same on all ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import tensorflow as tf


def number() -> int:
    """Number of the next collective in the program that is being traced; 0 outside `tf.function`.

    Counted by outermost graph: whatever a rank has traced before, or traces again alone, the n-th collective of a
    program is the n-th everywhere. Eager collectives are done one after the other, so they need no number.
    """
    if tf.executing_eagerly():
        return 0
    graph = _outermost(tf.compat.v1.get_default_graph())
    graph._disttrain_collectives = getattr(graph, "_disttrain_collectives", 0) + 1
    return graph._disttrain_collectives


@contextlib.contextmanager
def after_the_last() -> Iterator[Callable[[tf.Tensor], None]]:
    """Ops made inside run after the one noted last: `tf.function` by itself orders by data alone.

    Yields a function that notes the op of a tensor as the last one.
    """
    if tf.executing_eagerly():
        yield lambda tensor: None
        return
    graph = tf.compat.v1.get_default_graph()
    last = getattr(graph, "_disttrain_last", None)
    with tf.control_dependencies([] if last is None else [last]):
        yield lambda tensor: setattr(graph, "_disttrain_last", tensor.op)


def _outermost(graph: tf.Graph) -> tf.Graph:
    outer = getattr(graph, "outer_graph", None)
    return graph if outer is None or not outer.building_function else _outermost(outer)
