"""The words that all rooms share: `Loss` and `StepOutput`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeAlias

import keras
import tensorflow as tf

from disttrain.errors import LossError

Variable: TypeAlias = keras.Variable | tf.Variable
Gradient: TypeAlias = tf.Tensor | tf.IndexedSlices | None


@dataclasses.dataclass(frozen=True)
class Loss:
    """What a loss function returns: a sum and a weight, never a mean.

    Sums can be added over micro-batches and replicas and divided once; means cannot.

    Attributes:
      total: float scalar, the sum of the (weighted) losses of these examples.
      weight: scalar, what the sum is to be divided by over the whole batch: the number of
        examples or tokens, or the sum of the sample weights.
      metrics: name -> (sum, weight), scalars that are reported as sum / weight.
      checks: sentence -> scalar count of the examples of which the sentence is not true. Any count above
        zero stops the step on all replicas with a `LossError` that quotes the sentence; nothing is applied.
    """

    total: tf.Tensor
    weight: tf.Tensor
    metrics: Mapping[str, tuple[tf.Tensor, tf.Tensor]] = dataclasses.field(default_factory=dict)
    checks: Mapping[str, tf.Tensor] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class StepOutput:
    """What one optimizer step did. The same on every replica, but for `waited` and `traced`.

    Attributes:
      loss: float32 scalar, the weighted mean loss of the whole batch, before the update.
      weight: float32 scalar, the weight of the whole batch.
      grad_norm: float32 scalar, the global L2 norm of the averaged gradient, before `after_reduce`.
      applied: False where the step was skipped (a gradient that was not finite).
      metrics: name -> float32 scalar, the weighted mean over the whole batch.
      step: optimizer steps done so far, this one included.
      examples: float32 scalar, the number of examples in the whole batch.
      live: number of workers that brought a batch; 0 where all had none left, and the step did nothing.
      stop: whether any worker was asked to end; the same on all of them.
      waited: seconds from this worker's own gradients to the reduced ones, its own: the time on the way and, for all but the
        slowest worker, the wait for that one. 0.0 where there is one worker. A wait within the tape, in layers with
        `synchronized=True`, is not in it.
      traced: whether this worker traced or compiled something in this step, which therefore took longer than others will.
      regroup: whether hosts have come or gone in an elastic job, so that all workers should call `comm.regroup()`.
    """

    loss: tf.Tensor
    weight: tf.Tensor
    grad_norm: tf.Tensor
    applied: bool
    metrics: dict[str, tf.Tensor]
    step: int
    examples: tf.Tensor
    live: int
    stop: bool
    waited: float
    traced: bool
    regroup: bool


def as_loss(value: Any) -> Loss:
    """Turns what a loss function returned into a `Loss` of float32 scalars.

    Args:
      value: a `Loss`, or per-example losses of shape [examples]: their sum, weighted by their number.

    Raises:
      LossError: a 0-d tensor (a mean, or a sum that lost its weight), a tensor of rank 2 or more, a `Loss` whose
        fields are not scalars, or anything else.
    """
    if isinstance(value, Loss):
        pairs = {name: tuple(_scalar(f"metric {name!r}", x) for x in pair) for name, pair in value.metrics.items()}
        checks = {sentence: _scalar(f"check {sentence!r}", x) for sentence, x in value.checks.items()}
        return Loss(_scalar("total", value.total), _scalar("weight", value.weight), pairs, checks)
    if not tf.is_tensor(value):
        raise LossError(
            f"loss_fn returned {type(value).__name__}; return dt.Loss(total, weight) or a vector of per-example losses"
        )
    if value.shape.rank == 0:
        raise LossError(
            "loss_fn returned a 0-d tensor. A mean cannot be summed over micro-batches and replicas; return the "
            "per-example losses (reduction=None), or dt.Loss(total, weight) with the sum and what to divide it by"
        )
    if value.shape.rank is None:
        raise LossError(
            "loss_fn returned losses of unknown shape; a vector [examples] is wanted: tf.ensure_shape(losses, [None]) says so"
        )
    if value.shape.rank != 1:
        raise LossError(
            f"loss_fn returned losses of shape {value.shape}; a vector [examples] is wanted. "
            "For losses of tokens or pixels return dt.Loss(total=sum, weight=count)"
        )
    losses = tf.cast(value, tf.float32)
    return Loss(tf.reduce_sum(losses), tf.cast(tf.size(losses), tf.float32))


def _scalar(name: str, value: Any) -> tf.Tensor:
    value = tf.cast(value, tf.float32)
    if value.shape.rank != 0:
        raise LossError(f"dt.Loss: {name} has shape {value.shape}; a scalar is wanted (sum it over the examples)")
    return value


def tf_variable(variable: Variable) -> tf.Variable:
    """The TensorFlow variable in a Keras variable."""
    return variable.value if isinstance(variable, keras.Variable) else variable


def name_of(variable: Variable) -> str:
    """What a person calls the variable: its path in a Keras model ("dense/kernel"), or its TensorFlow name."""
    return variable.path if isinstance(variable, keras.Variable) else variable.name.removesuffix(":0")
