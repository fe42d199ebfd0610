"""Distributed training for TensorFlow and Keras 3, with the gradient in plain sight."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from disttrain import callbacks as callbacks
    from disttrain import data as data
    from disttrain import losses as losses
    from disttrain.checkpoint import Checkpointer as Checkpointer
    from disttrain.comm import Communicator as Communicator
    from disttrain.comm import init as init
    from disttrain.gradients import transforms as transforms
    from disttrain.keras import DistributedOptimizer as DistributedOptimizer
    from disttrain.step import TrainStep as TrainStep
    from disttrain.trainer import Trainer as Trainer
    from disttrain.types import Loss as Loss
    from disttrain.types import StepOutput as StepOutput

# TensorFlow takes seconds to import; `disttrain --help` should not.
_HOMES = {
    "Checkpointer": "disttrain.checkpoint",
    "Communicator": "disttrain.comm",
    "DistributedOptimizer": "disttrain.keras",
    "DisttrainError": "disttrain.errors",
    "Loss": "disttrain.types",
    "StepOutput": "disttrain.types",
    "TrainStep": "disttrain.step",
    "Trainer": "disttrain.trainer",
    "init": "disttrain.comm",
}
_MODULES = {
    "callbacks": "disttrain.callbacks",
    "data": "disttrain.data",
    "losses": "disttrain.losses",
    "transforms": "disttrain.gradients.transforms",
}

__all__ = sorted([*_HOMES, *_MODULES, "__version__"])


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(_MODULES[name])
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'disttrain' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
