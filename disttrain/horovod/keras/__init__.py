"""Horovod for Keras 3: instead of `import horovod.tensorflow.keras as hvd` say `import disttrain.horovod.keras as hvd`.

See `disttrain.horovod`.
"""

from __future__ import annotations

from typing import Any

import keras

import disttrain.horovod as _hvd
from disttrain.errors import ConfigError
from disttrain.horovod import (
    Average,
    Compression,
    PartialDistributedOptimizer,
    ProcessSet,
    Sum,
    add_process_set,
    broadcast_global_variables,
    ccl_built,
    cross_rank,
    cross_size,
    cuda_built,
    ddl_built,
    global_process_set,
    gloo_built,
    gloo_enabled,
    init,
    is_initialized,
    local_rank,
    local_size,
    mpi_built,
    mpi_enabled,
    mpi_threads_supported,
    nccl_built,
    rank,
    remove_process_set,
    rocm_built,
    shutdown,
    size,
    start_timeline,
    stop_timeline,
)
from disttrain.horovod.keras import callbacks, elastic
from disttrain.horovod.optimizer import wrap

__all__ = [
    "Average",
    "Compression",
    "DistributedOptimizer",
    "PartialDistributedOptimizer",
    "ProcessSet",
    "Sum",
    "add_process_set",
    "allgather",
    "allreduce",
    "broadcast",
    "broadcast_global_variables",
    "callbacks",
    "ccl_built",
    "cross_rank",
    "cross_size",
    "cuda_built",
    "ddl_built",
    "elastic",
    "global_process_set",
    "gloo_built",
    "gloo_enabled",
    "init",
    "is_initialized",
    "load_model",
    "local_rank",
    "local_size",
    "mpi_built",
    "mpi_enabled",
    "mpi_threads_supported",
    "nccl_built",
    "rank",
    "reducescatter",
    "remove_process_set",
    "rocm_built",
    "shutdown",
    "size",
    "start_timeline",
    "stop_timeline",
]


def DistributedOptimizer(  # noqa: N802
    optimizer: keras.optimizers.Optimizer,
    name: str | None = None,
    device_dense: str = "",
    device_sparse: str = "",
    compression: Any = Compression.none,
    sparse_as_dense: bool = False,
    gradient_predivide_factor: float = 1.0,
    op: Any = Average,
    backward_passes_per_step: int = 1,
    average_aggregated_gradients: bool = False,
    num_groups: int = 0,
    groups: Any = None,
    process_set: Any = global_process_set,
    scale_local_gradients: bool = True,
) -> keras.optimizers.Optimizer:
    """As `disttrain.horovod.DistributedOptimizer`, with the arguments in the order that they have here."""
    return wrap(
        optimizer,
        compression=compression,
        sparse_as_dense=sparse_as_dense,
        passes=backward_passes_per_step,
        op=op,
        predivide=gradient_predivide_factor,
        average=average_aggregated_gradients,
        num_groups=num_groups,
        groups=groups,
        process_set=process_set,
        scale_local=scale_local_gradients,
    )


def allreduce(
    value: Any,
    name: str | None = None,
    average: bool | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    op: Any = None,
    compression: Any = Compression.none,
) -> Any:
    """Reduces a value over ranks; by default their average."""
    return _hvd.allreduce(
        value,
        name=name,
        average=average,
        prescale_factor=prescale_factor,
        postscale_factor=postscale_factor,
        op=op,
        compression=compression,
    )


def allgather(value: Any, name: str | None = None) -> Any:
    """Concatenates values of all ranks along the first dimension."""
    return _hvd.allgather(value, name=name)


def broadcast(value: Any, root_rank: int, name: str | None = None) -> Any:
    """The value that rank `root_rank` has."""
    return _hvd.broadcast(value, root_rank, name=name)


def reducescatter(value: Any, name: str | None = None, op: Any = Average) -> Any:
    """Reduces a value over ranks and gives each its part of the first dimension."""
    return _hvd.reducescatter(value, name=name, op=op)


def load_model(
    filepath: Any,
    custom_optimizers: Any = None,
    custom_objects: dict[str, Any] | None = None,
    compression: Any = Compression.none,
    legacy_opts: bool = False,
) -> keras.Model:
    """Loads a saved model, its optimizer with its state and distributed.

    Args:
      filepath: of `keras.saving.load_model`.
      custom_optimizers: classes of optimizers that Keras does not know.
      custom_objects: other classes and functions by name.
      compression: how gradients travel.
      legacy_opts: False; Keras 3 has no legacy optimizers.
    """
    if legacy_opts:
        raise ConfigError(
            "legacy_opts=True: Keras 3 has no tf.keras.optimizers.legacy, save the model with a Keras optimizer"
        )
    known = {cls.__name__: cls for cls in custom_optimizers or ()} | (custom_objects or {})
    model = keras.saving.load_model(filepath, custom_objects=known)
    if model.optimizer is not None:
        DistributedOptimizer(model.optimizer, compression=compression)
        model.jit_compile = False
    return model
