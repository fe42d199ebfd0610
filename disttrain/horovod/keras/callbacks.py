"""Callbacks with Horovod's names and arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras

from disttrain import callbacks
from disttrain.errors import ConfigError
from disttrain.horovod.communicator import ProcessSetCommunicator
from disttrain.keras import key_of
from disttrain.types import Variable


class BroadcastGlobalVariablesCallback(callbacks.Broadcast):
    """All ranks train on from rank `root_rank`'s weights and optimizer state.

    Args:
      root_rank: rank whose values all ranks get.
      device: not used.
      local_variables: one variable or several that stay each rank's own.
    """

    def __init__(self, root_rank: int, device: str = "", local_variables: Any = None):
        super().__init__(ProcessSetCommunicator(), root_rank)
        self._local: set = set()
        if local_variables is None or not hasattr(local_variables, "assign"):
            local_variables = list(local_variables or ())
        else:
            local_variables = [local_variables]
        for variable in local_variables:
            self.register_local_var(variable)

    def register_local_var(self, var: Variable) -> None:
        """Leaves a variable to each rank."""
        if not hasattr(var, "assign"):
            raise ConfigError("All local variables must be variables.")
        self._local.add(key_of(var))

    def variables(self) -> list[keras.Variable]:
        return [v for v in super().variables() if key_of(v) not in self._local]


class MetricAverageCallback(callbacks.MetricAverage):
    """Replaces metrics at the end of an epoch by their average over ranks, each rank with the same weight.

    Args:
      device: not used.
    """

    def __init__(self, device: str = ""):
        super().__init__(ProcessSetCommunicator(), examples=1, validation_examples=1)


class LearningRateScheduleCallback(callbacks.LearningRateSchedule):
    """See `disttrain.callbacks.LearningRateSchedule`. The learning rate is logged as "lr"."""

    log_name = "lr"

    def __init__(
        self,
        initial_lr: float,
        multiplier: float | Callable[[float], float],
        start_epoch: int = 0,
        end_epoch: int | None = None,
        staircase: bool = True,
        momentum_correction: bool = True,
        steps_per_epoch: int | None = None,
    ):
        _want(initial_lr)
        super().__init__(
            initial_lr, multiplier, start_epoch, end_epoch, staircase, momentum_correction, steps_per_epoch
        )


class LearningRateWarmupCallback(callbacks.LearningRateWarmup):
    """See `disttrain.callbacks.LearningRateWarmup`. The learning rate is logged as "lr"."""

    log_name = "lr"

    def __init__(
        self,
        initial_lr: float,
        warmup_epochs: int = 5,
        momentum_correction: bool = True,
        steps_per_epoch: int | None = None,
        verbose: int = 0,
    ):
        _want(initial_lr)
        comm = ProcessSetCommunicator()
        super().__init__(comm, initial_lr, warmup_epochs, momentum_correction, steps_per_epoch, verbose)


class BestModelCheckpoint(keras.callbacks.ModelCheckpoint):
    """`ModelCheckpoint` of the best model, whose `filepath` is set later."""

    def __init__(
        self,
        monitor: str = "val_loss",
        verbose: int = 0,
        save_weights_only: bool = False,
        mode: str = "auto",
        save_freq: str | int = "epoch",
    ):
        super().__init__(
            filepath="best.weights.h5" if save_weights_only else "best.keras",
            monitor=monitor,
            verbose=verbose,
            save_best_only=True,
            save_weights_only=save_weights_only,
            mode=mode,
            save_freq=save_freq,
        )
        self.filepath = None


def _want(initial_lr: float | None) -> None:
    if initial_lr is None:
        raise ConfigError("Parameter `initial_lr` is required")
