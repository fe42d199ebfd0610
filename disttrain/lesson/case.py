"""What a case is, and the data and the model that all of them share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import keras
import numpy as np

PROMISE = 1e-6
NOT_INSTALLED = "not installed"


@dataclasses.dataclass(frozen=True)
class Case:
    """One thing that people do, and what becomes of it.

    Attributes:
      key: a word for files and tests.
      who: what trains, and where; `code` in backticks.
      what: what it is asked for.
      lesson: what went wrong in the peer, and why.
      peer: trains as this case says, and returns the update, or one for each rank [ranks, weights].
      expected: what the sentence in `lesson` is about; of anything else it would be untrue.
      sizes: examples in each batch of the whole group; an optimizer step for each.
      weights: sample weights, 12 zeros before 20 ones.
      clip: how the averaged gradient is to be clipped, with `limit`.
      learning_rate: 10 where a clipped update is so small that float32 weights round it by more than the 1e-6 that
        is to be measured. The relative error is otherwise the same.
      accumulate: micro-batches of each batch.
      fit_batch: the batch size that `fit` is given.
    """

    key: str
    who: str
    what: str
    lesson: str
    peer: Callable[[Case], np.ndarray]
    expected: Literal["right", "wrong", "raises"] = "wrong"
    sizes: tuple[int, ...] = (32,)
    weights: bool = False
    clip: Literal["global_clipnorm", "clipvalue"] | None = None
    limit: float = 0.0
    learning_rate: float = 0.1
    accumulate: int = 1
    fit_batch: int = 32

    @property
    def name(self) -> str:
        """The case in one line."""
        return f"{self.who}: {self.what}"

    def batches(self) -> list[tuple[np.ndarray, ...]]:
        """The batches of the whole group. The second half of the inputs is three times as large: replicas differ."""
        rng = np.random.default_rng(0)
        inputs = rng.normal(size=(32, 10)).astype("float32")
        inputs[16:] *= 3
        labels = rng.normal(size=(32, 1)).astype("float32")
        columns = [inputs, labels] + self.weights * [np.float32([0] * 12 + [1] * 20)]
        return [tuple(column[:size] for column in columns) for size in self.sizes]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a case came to.

    Attributes:
      case: the case.
      peer_error: error of the peer's update; None where there is none.
      peer_failure: the exception's name where the peer raised, or that it is not installed; None where it ran.
      peer_message: the first line of that exception.
      error: error of disttrain's update.
    """

    case: Case
    peer_error: float | None
    peer_failure: str | None
    peer_message: str | None
    error: float

    @property
    def kind(self) -> str:
        """What became of the peer: "right", "wrong", "raises" or "not installed"."""
        if self.peer_error is None:
            return NOT_INSTALLED if self.peer_failure == NOT_INSTALLED else "raises"
        return "right" if self.peer_error <= PROMISE else "wrong"


def build_model() -> keras.Model:
    """A regression MLP with the same weights every time."""
    keras.utils.set_random_seed(1)
    return keras.Sequential(
        [keras.layers.Input((10,)), keras.layers.Dense(16, activation="tanh"), keras.layers.Dense(1)]
    )


def weights_of(model: keras.Model) -> np.ndarray:
    """All trainable weights in one vector."""
    return np.concatenate([v.numpy().ravel() for v in model.trainable_variables])
