"""Losses as sums and weights, for batches (inputs, labels) and (inputs, labels, sample_weight).

Each function here makes a `loss_fn` for `TrainStep`: (model, batch, training=True) -> `Loss`. The average that results is
the sum of weighted losses over the sum of weights (Keras divides by the number of examples instead, so that its loss
shrinks where weights are zero). Whatever `model.losses` holds (regularizers) is added to that average.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import keras
import tensorflow as tf

from disttrain.errors import DataError, LossError
from disttrain.types import Loss

LossFn: TypeAlias = Callable[..., Loss]


def sparse_categorical_crossentropy(from_logits: bool = True, ignore: int | None = None) -> LossFn:
    """Cross-entropy of integer labels [examples, ...] with outputs [examples, ..., classes]; metric "accuracy".

    Args:
      from_logits: whether the model's outputs are logits; False: probabilities, as after a softmax.
      ignore: a label that counts nothing, such as padding. Every other one must be a class.
    """

    def per_item(labels, outputs):
        if outputs.shape.rank != labels.shape.rank + 1:
            raise LossError(
                f"labels of shape {labels.shape} do not fit outputs of shape {outputs.shape}: integer labels have "
                "every dimension of the outputs but the last (for one-hot labels use categorical_crossentropy)"
            )
        if not labels.dtype.is_integer:
            raise LossError(f"labels are {labels.dtype.name}; integers are wanted")
        classes = outputs.shape[-1]
        counted = tf.ones_like(labels, tf.float32) if ignore is None else tf.cast(labels != ignore, tf.float32)
        valid = (labels >= 0) & (labels < classes)
        strange = tf.reduce_sum(tf.where(valid, 0.0, counted))
        labels = tf.where(valid, labels, tf.zeros_like(labels))
        losses = keras.ops.sparse_categorical_crossentropy(labels, outputs, from_logits=from_logits)
        hits = tf.cast(tf.argmax(outputs, axis=-1, output_type=labels.dtype) == labels, tf.float32)
        return (
            losses,
            {"accuracy": hits},
            counted,
            {f"labels are 0 to {classes - 1}, as the outputs have {classes} classes": strange},
        )

    return _loss_fn(per_item)


def categorical_crossentropy(from_logits: bool = True) -> LossFn:
    """Cross-entropy of one-hot or soft labels [examples, ..., classes] with outputs of the same shape; "accuracy"."""

    def per_item(labels, outputs):
        labels = tf.cast(_same_shape(labels, outputs), outputs.dtype)
        losses = keras.ops.categorical_crossentropy(labels, outputs, from_logits=from_logits)
        hits = tf.cast(tf.argmax(outputs, axis=-1) == tf.argmax(labels, axis=-1), tf.float32)
        return losses, {"accuracy": hits}, None, {}

    return _loss_fn(per_item)


def binary_crossentropy(from_logits: bool = True) -> LossFn:
    """Cross-entropy of labels in [0, 1] with outputs of the same shape [examples, ...]; metric "accuracy"."""

    def per_item(labels, outputs):
        labels = tf.cast(_same_shape(labels, outputs), outputs.dtype)
        losses = keras.ops.binary_crossentropy(labels, outputs, from_logits=from_logits)
        hits = tf.cast((outputs > (0.0 if from_logits else 0.5)) == (labels > 0.5), tf.float32)
        return losses, {"accuracy": hits}, None, {}

    return _loss_fn(per_item)


def mean_squared_error() -> LossFn:
    """Squared differences, averaged over the last axis as Keras does; labels and outputs [examples, ...]."""
    return _loss_fn(lambda labels, outputs: (_last_axis_mean(tf.square(_difference(labels, outputs))), {}, None, {}))


def mean_absolute_error() -> LossFn:
    """Absolute differences, averaged over the last axis as Keras does; labels and outputs [examples, ...]."""
    return _loss_fn(lambda labels, outputs: (_last_axis_mean(tf.abs(_difference(labels, outputs))), {}, None, {}))


def weighted(
    losses: tf.Tensor,
    weights: tf.Tensor | None = None,
    metrics: dict[str, tf.Tensor] | None = None,
    checks: dict[str, tf.Tensor] | None = None,
) -> Loss:
    """The building block for losses of your own: sums of losses times weights, and of the weights.

    Args:
      losses: float, any shape [examples, ...]: of examples, tokens, pixels.
      weights: sample weights or a mask, of the same shape or of its leading dimensions; None: one each.
      metrics: name -> values of the shape of `losses`, weighted like them.
      checks: see `Loss`.

    Raises:
      LossError: weights that do not fit the losses.
    """
    losses = tf.cast(losses, tf.float32)
    weights = tf.ones_like(losses) if weights is None else _spread(tf.cast(weights, tf.float32), losses)
    total = tf.reduce_sum(weights)
    summed = {name: (tf.reduce_sum(tf.cast(x, tf.float32) * weights), total) for name, x in (metrics or {}).items()}
    # Where the weight is zero the loss may be anything, NaN of a masked padding included.
    return Loss(tf.reduce_sum(tf.math.multiply_no_nan(losses, weights)), total, summed, checks or {})


def _loss_fn(per_item: Callable) -> LossFn:
    def loss_fn(model: Any, batch: Any, training: bool = True) -> Loss:
        inputs, labels, sample_weight = _unpack(batch)
        outputs = model(inputs, training=training)
        losses, metrics, counted, checks = per_item(labels, outputs)
        weights = _combine(losses, sample_weight, counted, getattr(outputs, "_keras_mask", None))
        loss = weighted(losses, weights, metrics, checks)
        return add_penalties(loss, model)

    return loss_fn


def add_penalties(loss: Loss, model: Any) -> Loss:
    """The loss with `model.losses` (regularizers, `add_loss`) added to its average."""
    penalties = getattr(model, "losses", None)
    if not penalties:
        return loss
    penalty = tf.add_n([tf.cast(p, tf.float32) for p in penalties])
    return Loss(loss.total + loss.weight * penalty, loss.weight, loss.metrics, loss.checks)


def _unpack(batch):
    if not isinstance(batch, (tuple, list)) or len(batch) not in (2, 3):
        raise DataError(
            "losses of disttrain take batches (inputs, labels) or (inputs, labels, sample_weight); "
            "for any other, write loss_fn(model, batch) yourself"
        )
    return (*batch, None) if len(batch) == 2 else batch


def _combine(losses, *weights):
    present = [_spread(tf.cast(w, tf.float32), losses) for w in weights if w is not None]
    return tf.math.reduce_prod(tf.stack(present), axis=0) if present else None


def _spread(weights, losses):
    """Weights of the leading dimensions, repeated over the others."""
    missing = losses.shape.rank - weights.shape.rank
    if missing < 0 and weights.shape[-1] == 1:
        weights, missing = tf.squeeze(weights, -1), missing + 1
    lead = losses.shape[: weights.shape.rank]
    if missing < 0 or not lead.is_compatible_with(weights.shape):
        raise LossError(f"weights of shape {weights.shape} do not fit losses of shape {losses.shape}")
    weights = tf.reshape(weights, tf.concat([tf.shape(weights), tf.ones([missing], tf.int32)], axis=0))
    return tf.broadcast_to(weights, tf.shape(losses))


def _same_shape(labels, outputs):
    if labels.shape.rank == outputs.shape.rank - 1 and outputs.shape[-1] == 1:
        labels = labels[..., tf.newaxis]
    if not labels.shape.is_compatible_with(outputs.shape):
        raise LossError(
            f"labels of shape {labels.shape} do not fit outputs of shape {outputs.shape}: they must be equal"
        )
    return labels


def _difference(labels, outputs):
    return outputs - tf.cast(_same_shape(labels, outputs), outputs.dtype)


def _last_axis_mean(x):
    return tf.reduce_mean(x, axis=-1) if x.shape.rank > 1 else x
