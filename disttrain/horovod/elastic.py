"""States that elastic jobs save, restore and synchronize. Horovod's loop, with states that know Keras 3."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from disttrain.errors import ConfigError
from disttrain.horovod.engine import hvd
from disttrain.horovod.functions import broadcast_object, broadcast_variables
from disttrain.types import Variable

HorovodInternalError, ObjectState, run = hvd.elastic.HorovodInternalError, hvd.elastic.ObjectState, hvd.elastic.run

__all__ = ["HorovodInternalError", "ObjectState", "TensorFlowKerasState", "TensorFlowState", "run"]


class _VariablesState(ObjectState):
    """Objects, and variables of which `_all_variables` says what they are now."""

    def __init__(self, **kwargs: Any):
        self._saved: list[tuple[Variable, Any]] = []
        super().__init__(bcast_object=broadcast_object, get_rank=hvd.rank, **kwargs)
        self._save_variables()

    def save(self) -> None:
        self._save_variables()
        super().save()

    def restore(self) -> None:
        for variable, value in self._saved:
            variable.assign(value)
        super().restore()

    def sync(self) -> None:
        """Everything as it is on rank 0."""
        broadcast_variables(self._shared_variables(), root_rank=0)
        self._save_variables()
        super().sync()

    def _save_variables(self) -> None:
        self._saved = [(variable, variable.numpy()) for variable in self._all_variables()]

    def _all_variables(self) -> list[Variable]:
        raise NotImplementedError

    def _shared_variables(self) -> list[Variable]:
        return self._all_variables()


class TensorFlowKerasState(_VariablesState):
    """State of a Keras model and its optimizer.

    Seeds of dropout are saved and restored, but stay each rank's own when ranks synchronize.

    Args:
      model: Keras model that has been built.
      optimizer: default: the one that the model was compiled with.
      backend: not used; for scripts that give it.
      kwargs: objects to keep besides, which become attributes.
    """

    def __init__(
        self,
        model: keras.Model,
        optimizer: keras.optimizers.Optimizer | None = None,
        backend: Any = None,
        **kwargs: Any,
    ):
        if not model.built:
            raise ConfigError("Model must be built first. Run `model.build(input_shape)`.")
        self.model, self.optimizer, self.backend = model, optimizer or model.optimizer, backend
        if self.optimizer is not None and not self.optimizer.built:
            self.optimizer.build(model.trainable_variables)
        super().__init__(**kwargs)

    def reset(self) -> None:
        """The number of ranks is part of what was traced."""
        if getattr(self.model, "train_function", None) is not None:
            self.model.make_train_function(force=True)

    def _all_variables(self) -> list[Variable]:
        return [*self.model.variables, *self._optimizer_variables()]

    def _shared_variables(self) -> list[Variable]:
        return [*self.model.weights, *self._optimizer_variables()]

    def _optimizer_variables(self) -> list[Variable]:
        return list(self.optimizer.variables) if self.optimizer is not None else []


class TensorFlowState(_VariablesState):
    """State of TensorFlow variables.

    Args:
      variables: `tf.Variable` or Keras variables.
      session: not used; for scripts that give it.
      kwargs: objects to keep besides, which become attributes.
    """

    def __init__(self, variables: Sequence[Variable] | None = None, session: Any = None, **kwargs: Any):
        self.variables = list(variables or tf.compat.v1.global_variables())
        super().__init__(**kwargs)

    def _all_variables(self) -> list[Variable]:
        return self.variables
