"""Callbacks for Keras's `fit` on many ranks: equal weights at the start, metrics of all ranks, learning-rate warmup."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from disttrain.comm.communicator import Communicator
from disttrain.errors import ConfigError
from disttrain.optim import keras_optimizer


class Broadcast(keras.callbacks.Callback):
    """All ranks train on from one rank's weights and optimizer state.

    Where the model is built when `fit` is called, before the first step; else at the end of the first batch, which has
    then been trained from each rank's own weights: give models an input shape. Seeds of dropout stay each rank's own.

    Args:
      comm: from `disttrain.init`.
      root: rank whose values all ranks get.
    """

    def __init__(self, comm: Communicator, root: int = 0):
        super().__init__()
        self._comm, self._root, self._done = comm, root, False

    def on_train_begin(self, logs: dict | None = None) -> None:
        self._done = False
        if self.model.built:
            self._broadcast()

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        if not self._done:
            self._broadcast()

    def variables(self) -> list[keras.Variable]:
        """What is broadcast."""
        optimizer = self.model.optimizer
        return [*self.model.weights, *(optimizer.variables if optimizer else [])]

    def _broadcast(self) -> None:
        optimizer = self.model.optimizer
        if optimizer and not optimizer.built:
            with self._comm.scope():
                optimizer.build(self.model.trainable_variables)
        self._comm.broadcast(self.variables(), self._root)
        self._done = True


class MetricAverage(keras.callbacks.Callback):
    """Replaces the metrics at the end of each epoch by their average over ranks, on all ranks the same.

    Put it before callbacks that look at metrics, such as `ModelCheckpoint` or `ReduceLROnPlateau`. A rank's metric weighs as
    much as the batches that it comes from, which is exact for batches of one size; say how many examples there are where
    ranks have different numbers of them. A metric that some ranks do not have is averaged over those that have it.

    Args:
      comm: from `disttrain.init`.
      examples: number of training examples of this rank in an epoch. Default: its number of batches.
      validation_examples: the same for metrics that begin with "val_".
    """

    def __init__(self, comm: Communicator, examples: float | None = None, validation_examples: float | None = None):
        super().__init__()
        self._comm, self._examples, self._validation_examples = comm, examples, validation_examples
        self._batches = self._validation_batches = 0

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        self._batches = self._validation_batches = 0

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        self._batches = batch + 1

    def on_test_batch_end(self, batch: int, logs: dict | None = None) -> None:
        self._validation_batches = batch + 1

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        if logs is not None:
            mine = {name: (float(value), self._weight(name)) for name, value in logs.items() if np.isscalar(value)}
            logs.update(weighted_means(self._comm.all_gather_object(mine)))

    def _weight(self, name: str) -> float:
        if name.startswith("val_"):
            given, counted = self._validation_examples, self._validation_batches
        else:
            given, counted = self._examples, self._batches
        # Metrics without a batch come from other callbacks, the same number from each rank.
        return float(given if given is not None else counted or 1)


def weighted_means(by_rank: list[dict[str, tuple[float, float]]]) -> dict[str, float]:
    """Name -> (value, weight) of each rank, to name -> mean. Names without weight on any rank are left out."""
    means = {}
    for name in sorted(set().union(*by_rank)):
        values, weights = zip(*(metrics[name] for metrics in by_rank if name in metrics), strict=True)
        if sum(weights) > 0:
            means[name] = float(np.average(values, weights=weights))
    return means


class LearningRateSchedule(keras.callbacks.Callback):
    """Learning rate `initial_lr * multiplier(epoch)` from `start_epoch` on, until `end_epoch` begins.

    With momentum, the velocity is scaled by the same factor whenever the learning rate changes: the momentum correction of
    Goyal et al. (Accurate, Large Minibatch SGD, 2017).

    Args:
      initial_lr: learning rate that the multiplier is of. Default: the optimizer's when training begins.
      multiplier: a function of the epoch, or a number m, which stands for m ** (epoch - start_epoch).
      start_epoch, end_epoch: outside of them the learning rate is left alone. `end_epoch` None: to the end.
      staircase: whether the learning rate changes once an epoch; else with every batch, and the epoch given to
        `multiplier` has a fraction.
      momentum_correction: whether to scale the velocity of SGD and RMSprop with momentum.
      steps_per_epoch: needed without `staircase` for datasets whose length Keras does not know.

    Raises:
      ConfigError: during `fit`, if the optimizer has a schedule of its own or the steps of an epoch are not known.
    """

    log_name = "learning_rate"

    def __init__(
        self,
        initial_lr: float | None,
        multiplier: float | Callable[[float], float],
        start_epoch: int = 0,
        end_epoch: int | None = None,
        staircase: bool = True,
        momentum_correction: bool = True,
        steps_per_epoch: int | None = None,
    ):
        super().__init__()
        self.initial_lr, self.start_epoch, self.end_epoch = initial_lr, start_epoch, end_epoch
        self.multiplier = multiplier if callable(multiplier) else lambda epoch: multiplier ** (epoch - start_epoch)
        self.staircase, self.momentum_correction, self.steps_per_epoch = staircase, momentum_correction, steps_per_epoch
        self._epoch = 0

    def on_train_begin(self, logs: dict | None = None) -> None:
        if self.initial_lr is None:
            self.initial_lr = self._learning_rate()
        if not self.staircase and not self.steps_per_epoch:
            self.steps_per_epoch = self.params.get("steps")
            if not self.steps_per_epoch:
                raise ConfigError(
                    f"{type(self).__name__}: Keras does not know the steps of an epoch, give steps_per_epoch="
                )

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        self._epoch = epoch

    def on_train_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        begun = self._epoch >= self.start_epoch
        if not begun or (self.end_epoch is not None and self._epoch >= self.end_epoch):
            return
        if not self.staircase:
            self._set(self._epoch + batch / self.steps_per_epoch)
        elif batch == 0:
            self._set(self._epoch)

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        if logs is not None:
            logs[self.log_name] = self._learning_rate()

    def _learning_rate(self) -> float:
        return float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate))

    def _set(self, epoch: float) -> None:
        before, now = self._learning_rate(), self.initial_lr * self.multiplier(epoch)
        try:
            self.model.optimizer.learning_rate = now
        except TypeError:
            raise ConfigError(
                f"{type(self).__name__}: the optimizer has a learning-rate schedule of its own: give it a number instead"
            ) from None
        if self.momentum_correction and before > 0 and now != before:
            for velocity in _velocities(self.model.optimizer):
                velocity.assign(velocity * (now / before))


class LearningRateWarmup(LearningRateSchedule):
    """Learning rate that grows from `initial_lr / size` to `initial_lr` in the first epochs, a little with every batch.

    For a learning rate that was multiplied by the number of ranks (Goyal et al., Accurate, Large Minibatch SGD, 2017).

    Args:
      comm: from `disttrain.init`.
      initial_lr: learning rate at the end of the warmup. Default: the optimizer's when training begins.
      warmup_epochs: number of epochs of the warmup.
      momentum_correction, steps_per_epoch: as in `LearningRateSchedule`.
      verbose: 1 says on rank 0 when the warmup has ended.
    """

    def __init__(
        self,
        comm: Any,
        initial_lr: float | None = None,
        warmup_epochs: int = 5,
        momentum_correction: bool = True,
        steps_per_epoch: int | None = None,
        verbose: int = 0,
    ):
        def multiplier(epoch: float) -> float:
            # The last batch of an epoch ends at the round number.
            epoch += 1.0 / self.steps_per_epoch
            return (epoch * (comm.size - 1) / warmup_epochs + 1) / comm.size

        super().__init__(initial_lr, multiplier, 0, warmup_epochs, False, momentum_correction, steps_per_epoch)
        self._comm, self._verbose = comm, verbose

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        super().on_epoch_end(epoch, logs)
        if self._verbose and self._comm.rank == 0 and epoch == self.end_epoch - 1:
            said = f"\nEpoch {epoch + 1}: finished gradual learning rate warmup to {self._learning_rate():g}.\n"
            sys.stdout.write(said)


def _velocities(optimizer: keras.optimizers.Optimizer) -> list[keras.Variable]:
    """What momentum accumulates, learning rate included."""
    inner, _ = keras_optimizer.unwrap(optimizer)
    if not getattr(inner, "momentum", 0):
        return []  # Adam's first moment does not contain the learning rate
    return [v for v in getattr(inner, "momentums", getattr(inner, "_momentums", [])) if v is not None]
