"""What IndexedSlices need: the gradients of embeddings, kept as rows and values as long as possible."""

from __future__ import annotations

from collections.abc import Callable

import tensorflow as tf

# Elements of a variable up to which its gradient is made dense at once: cheaper than looking after its rows.
SMALL = 1 << 20


def map_values(fn: Callable[[tf.Tensor], tf.Tensor], gradient):
    """Applies an elementwise function that maps 0 to 0; on IndexedSlices to their values alone. None stays None."""
    if gradient is None:
        return None
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(fn(gradient.values), gradient.indices, gradient.dense_shape)
    return fn(gradient)


def values_of(gradient) -> tf.Tensor:
    """The numbers of a dense gradient or of deduplicated IndexedSlices."""
    return gradient.values if isinstance(gradient, tf.IndexedSlices) else gradient


def deduplicate(gradient):
    """Sums the rows that occur more than once, so that norms and elementwise functions see each row once."""
    if not isinstance(gradient, tf.IndexedSlices):
        return gradient
    indices, position = tf.unique(gradient.indices)
    values = tf.math.unsorted_segment_sum(gradient.values, position, tf.size(indices))
    return tf.IndexedSlices(values, indices, gradient.dense_shape)


def densify(gradient, variable) -> tf.Tensor:
    """The gradient as one tensor of the variable's shape."""
    if not isinstance(gradient, tf.IndexedSlices):
        return gradient
    return tf.math.unsorted_segment_sum(gradient.values, gradient.indices, variable.shape[0])


def densify_small(gradient, variable):
    """Dense for variables of up to `SMALL` elements; else as it is."""
    return densify(gradient, variable) if tf.TensorShape(variable.shape).num_elements() <= SMALL else gradient


def add(left, right):
    """Sum of two gradients of one variable. IndexedSlices are joined, not densified."""
    if isinstance(left, tf.IndexedSlices):
        return tf.IndexedSlices(
            tf.concat([left.values, right.values], axis=0),
            tf.concat([left.indices, right.indices], axis=0),
            left.dense_shape,
        )
    return left + right


def zeros(variable, like):
    """A zero gradient of `variable`: dense, or IndexedSlices without rows where `like` is IndexedSlices."""
    if not isinstance(like, tf.IndexedSlices):
        return tf.zeros(variable.shape, like.dtype if like is not None else variable.dtype)
    shape = None if like.dense_shape is None else tf.constant(list(variable.shape), like.dense_shape.dtype)
    return _no_rows(like.values.shape, like.values.dtype, like.indices.dtype, shape)


def of_kind(kind, gradient, variable):
    """The gradient as every replica has it, whatever it is here: "dense", or "sparse" with int64 indices.

    None becomes zeros: this replica's loss does not depend on the variable. "none", of a variable that no replica's loss
    depends on, makes zeros of everything.
    """
    if kind == "none" or (kind == "dense" and gradient is None):
        return tf.zeros(variable.shape, variable.dtype)
    if kind == "dense":
        gradient = densify(gradient, variable)
        gradient.set_shape(variable.shape)  # some layers' gradients do not know it
        return gradient
    shape = tf.constant(list(variable.shape), tf.int64)
    if gradient is None:
        return _no_rows(variable.shape, variable.dtype, tf.int64, shape)
    if not isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(gradient, tf.range(shape[0]), shape)
    return tf.IndexedSlices(gradient.values, tf.cast(gradient.indices, tf.int64), shape)


def _no_rows(shape, dtype, index_dtype, dense_shape):
    return tf.IndexedSlices(tf.zeros([0, *shape[1:]], dtype), tf.zeros([0], index_dtype), dense_shape)


def square_sums(gradients) -> list[tf.Tensor]:
    """Sum of squares of each gradient, float32 scalars. IndexedSlices must be deduplicated."""
    # l2_loss reads its input once; square-then-sum would write and read it again.
    return [2.0 * tf.nn.l2_loss(tf.cast(values_of(g), tf.float32)) for g in gradients]
