"""A replica's share of the batch as a loop over micro-batches: sums in, sums out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from disttrain.gradients import sparse
from disttrain.gradients.tape import MicroBatch, ModelState, Sums, count_examples


def accumulate(
    micro_batch: MicroBatch,
    share: Any,
    steps: int,
    state: ModelState,
    *,
    first_index: int = 0,
    may_be_empty: bool = True,
    lockstep: bool = False,
) -> Sums:
    """Adds up the sums of the micro-batches of one share, holding one micro-batch's activations at a time.

    A share of n examples is cut into pieces of ceil(n / steps); the last may be smaller, and no model ever sees an
    empty one, unless in lockstep.

    Args:
      micro_batch: computes the sums of one piece.
      share: nest of tensors [n, ...].
      steps: number of micro-batches.
      state: of the model; its statistics run through the micro-batches in order.
      first_index: number of this replica's first micro-batch among all of the step (for noise).
      may_be_empty: False promises n > 0 and spares the check.
      lockstep: every replica runs exactly `steps` micro-batches, even empty ones, outside any loop, since a layer
        inside talks to the other replicas.
    """
    before = [tf.convert_to_tensor(v.value) for v in state.statistics]
    examples = count_examples(share)
    size = tf.maximum(-(-examples // steps), 1)

    def piece(index):
        if steps == 1:
            return share
        return tf.nest.map_structure(lambda x: x[index * size : (index + 1) * size], share)

    def sums_of(index, statistics) -> Sums:
        return micro_batch(piece(index), statistics, state.seeds_for(first_index + index))

    if steps == 1 and (lockstep or not may_be_empty):
        return sums_of(0, before)
    if lockstep:
        return _unrolled(sums_of, steps, before)
    return _looped(sums_of, -(-examples // size), before, micro_batch, micro_batch.outline(piece(0)))


def _unrolled(sums_of: Callable, steps: int, before: list) -> Sums:
    sums = sums_of(0, before)
    for index in range(1, steps):
        # Without this order the executor would hold the activations of all micro-batches at once.
        done = tf.nest.flatten([g for g in sums.gradients if g is not None], expand_composites=True)
        with tf.control_dependencies(done):
            sums = _add(sums, sums_of(index, sums.statistics))
    return sums


def _looped(sums_of: Callable, pieces: tf.Tensor, before: list, micro_batch: MicroBatch, outline: Sums) -> Sums:
    reached = [g is not None for g in outline.gradients]

    def pack(sums: Sums) -> list[tf.Tensor]:
        present = [g for g in sums.gradients if g is not None]
        moving = [sums.statistics[i] for i in micro_batch.updated]
        return tf.nest.flatten((present, sums.scalars, moving), expand_composites=True)

    def unpack(flat) -> Sums:
        like = ([g for g in outline.gradients if g is not None], outline.scalars, outline.statistics)
        present, scalars, moving = tf.nest.pack_sequence_as(like, flat, expand_composites=True)
        present, statistics = iter(present), list(before)
        for index, value in zip(micro_batch.updated, moving, strict=True):
            statistics[index] = value
        return Sums([next(present) if there else None for there in reached], scalars, statistics)

    def nothing():
        pairs = zip(micro_batch.variables, outline.gradients, strict=True)
        gradients = [None if g is None else sparse.zeros(v, g) for v, g in pairs]
        return pack(Sums(gradients, tf.nest.map_structure(lambda x: tf.zeros(x.shape), outline.scalars), before))

    def one_more(index, *flat):
        sums = unpack(flat)
        return [index + 1, *pack(_add(sums, sums_of(index, sums.statistics)))]

    # Starting from the first micro-batch, not from zeros, spares a pass over all gradients.
    flat = tf.cond(pieces > 0, lambda: pack(sums_of(0, before)), nothing)
    _, *flat = tf.while_loop(
        lambda index, *_: index < pieces,
        one_more,
        [tf.constant(1), *flat],
        shape_invariants=[tf.TensorShape([]), *_growing_shapes(outline)],
        parallel_iterations=1,
    )
    return unpack(flat)


def _growing_shapes(outline: Sums) -> list[tf.TensorShape]:
    """Static shapes of the packed sums: rows of IndexedSlices are joined, so their number changes in the loop."""
    shapes = []
    for gradient in outline.gradients:
        if isinstance(gradient, tf.IndexedSlices):
            shapes += [tf.TensorShape([None, *gradient.values.shape[1:]]), tf.TensorShape([None])]
            shapes += [] if gradient.dense_shape is None else [gradient.dense_shape.shape]
        elif gradient is not None:
            shapes.append(gradient.shape)
    return shapes + [x.shape for x in tf.nest.flatten((outline.scalars, outline.statistics))]


def _add(left: Sums, right: Sums) -> Sums:
    pairs = zip(left.gradients, right.gradients, strict=True)
    gradients = [None if a is None else sparse.add(a, b) for a, b in pairs]
    return Sums(gradients, tf.nest.map_structure(tf.add, left.scalars, right.scalars), right.statistics)
