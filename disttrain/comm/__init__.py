"""Ranks and tensors: one file for each backend, the same functions in each."""

from __future__ import annotations

import os

import keras
import tensorflow as tf

from disttrain.comm.communicator import Communicator
from disttrain.comm.local import LocalCommunicator
from disttrain.comm.mirrored import MirroredCommunicator
from disttrain.errors import BackendError, ConfigError

__all__ = ["Communicator", "init"]

# Set by launchers that start one process per rank; the value is the number of ranks.
_WORLD_SIZE_VARIABLES = ("HOROVOD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


def init(backend: str = "auto", *, replicas: int | None = None) -> Communicator:
    """Joins the group of replicas that train together. Call it before anything else uses TensorFlow.

    Args:
      backend: "local" (one device), "mirrored" (the devices of this machine), or "auto": mirrored where there are
        several GPUs or `replicas` asks for several, else local.
      replicas: number of replicas, for "mirrored" and "auto". GPUs where there are any, else logical CPU devices.

    Raises:
      BackendError: the backend is unknown or cannot start here, Keras does not run on TensorFlow, or a launcher started
        several processes, which these backends would train as so many unrelated models.
      ConfigError: `replicas` does not fit the backend.
    """
    if keras.backend.backend() != "tensorflow":
        raise BackendError(f"Keras runs on {keras.backend.backend()}, not TensorFlow: set KERAS_BACKEND=tensorflow")
    if replicas is not None and (not isinstance(replicas, int) or replicas < 1):
        raise ConfigError(f"replicas={replicas!r}: a whole number of 1 or more is wanted")
    if backend == "auto":
        _refuse_many_processes()
        several = replicas > 1 if replicas else len(tf.config.list_physical_devices("GPU")) > 1
        backend = "mirrored" if several else "local"
    if backend == "local":
        if replicas not in (None, 1):
            raise ConfigError(f"backend 'local' has one replica, {replicas} asked for: use backend 'mirrored'")
        return LocalCommunicator()
    if backend == "mirrored":
        return MirroredCommunicator(replicas)
    raise BackendError(f"unknown backend {backend!r}: use 'auto', 'local' or 'mirrored'")


def _refuse_many_processes() -> None:
    for name in _WORLD_SIZE_VARIABLES:
        if int(os.environ.get(name) or 1) > 1:
            raise BackendError(
                f"{name}={os.environ[name]}: a launcher started several processes, and no backend for several processes "
                "is available; start one process with backend='mirrored'"
            )
    if os.environ.get("TF_CONFIG"):
        raise BackendError(
            "TF_CONFIG is set, but no backend for several workers is available: unset it, or use backend='mirrored'"
        )
