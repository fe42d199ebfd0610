"""Elastic jobs in Keras's `fit`, with Horovod's names."""

from __future__ import annotations

import warnings
from typing import Any

import keras

from disttrain.horovod.elastic import TensorFlowKerasState, run

__all__ = ["CommitStateCallback", "KerasState", "UpdateBatchStateCallback", "UpdateEpochStateCallback", "run"]


class KerasState(TensorFlowKerasState):
    """State of a Keras model and its optimizer; see `TensorFlowKerasState`."""

    def __init__(self, model: keras.Model, optimizer: keras.optimizers.Optimizer | None = None, **kwargs: Any):
        super().__init__(model, optimizer=optimizer, **kwargs)


class CommitStateCallback(keras.callbacks.Callback):
    """Commits the state after every so many batches, and at the end of each epoch.

    Args:
      state: what is committed.
      batches_per_commit: batches from one commit to the next.
    """

    def __init__(self, state: Any, batches_per_commit: int = 1):
        super().__init__()
        self.state, self.batches_per_commit, self.batches_remaining = state, batches_per_commit, batches_per_commit

    def on_train_begin(self, logs: dict | None = None) -> None:
        # Ranks that come back from a reset count from the same batch.
        self.batches_remaining = self.batches_per_commit

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        self.batches_remaining -= 1
        if self.batches_remaining == 0:
            self.state.commit()
            self.batches_remaining = self.batches_per_commit

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        self.state.commit()


class UpdateBatchStateCallback(keras.callbacks.Callback):
    """Keeps the number of the batch in `state.batch`; zero at the end of an epoch.

    Where the number of steps in an epoch is known, the first epoch after a reset has as many fewer as were done before.

    Args:
      state: with an attribute `batch`.
    """

    def __init__(self, state: Any):
        super().__init__()
        self.state, self._done_before, self._first = state, 0, True

    def on_train_begin(self, logs: dict | None = None) -> None:
        self._first, self._done_before = True, self.state.batch

    def on_train_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        steps = (self.params or {}).get("steps")
        if self._first and self._done_before and steps and batch >= steps - self._done_before:
            # How Keras learns that an epoch has no more data.
            warnings.filterwarnings("ignore", "Your input ran out of data")
            raise StopIteration

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        self.state.batch = batch + self._done_before if self._first else batch

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        self._first, self.state.batch = False, 0


class UpdateEpochStateCallback(keras.callbacks.Callback):
    """Keeps the number of epochs done, those before a reset included, in `state.epoch`.

    Args:
      state: with an attribute `epoch`.
    """

    def __init__(self, state: Any):
        super().__init__()
        self.state, self.initial_epoch = state, state.epoch

    def on_train_begin(self, logs: dict | None = None) -> None:
        self.initial_epoch = self.state.epoch

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        # The next one: after a reset the epoch that is done is not done again.
        self.state.epoch = self.initial_epoch + epoch + 1
