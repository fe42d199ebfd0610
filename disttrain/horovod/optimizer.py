"""`DistributedOptimizer` with Horovod's arguments: disttrain's, on Horovod's ops."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from disttrain import agreement
from disttrain.errors import ConfigError
from disttrain.gradients import sparse
from disttrain.horovod.communicator import ProcessSetCommunicator
from disttrain.horovod.compression import Compression
from disttrain.horovod.engine import elastic_job, hvd
from disttrain.horovod.legacy import CallableList
from disttrain.keras import Distributed, Part, Reducer, as_kind, check_op, distribute, key_of
from disttrain.types import Gradient, Variable

_OPS = {hvd.Average: "mean", hvd.Sum: "sum", hvd.Adasum: "adasum"}


def DistributedOptimizer(  # noqa: N802
    optimizer: Any,
    name: str | None = None,
    use_locking: bool = False,
    device_dense: str = "",
    device_sparse: str = "",
    compression: Any = Compression.none,
    sparse_as_dense: bool = False,
    backward_passes_per_step: int = 1,
    op: Any = hvd.Average,
    gradient_predivide_factor: float = 1.0,
    average_aggregated_gradients: bool = False,
    num_groups: int = 0,
    groups: Any = None,
    process_set: Any = hvd.global_process_set,
    scale_local_gradients: bool = True,
) -> Any:
    """Makes an optimizer reduce its gradients over ranks before it applies them.

    A Keras optimizer is changed itself; see `disttrain.DistributedOptimizer`. One of `tf.compat.v1.train` is wrapped by
    Horovod's own class.

    Args:
      optimizer: the optimizer.
      name, use_locking: of `tf.compat.v1` optimizers.
      device_dense, device_sparse: of `tf.compat.v1` optimizers. For Keras's, tensors are reduced where they are.
      compression: `Compression.none`, `Compression.fp16`, or a class with `compress` and `decompress`.
      sparse_as_dense: IndexedSlices travel as dense tensors.
      backward_passes_per_step: calls of `apply_gradients` for each step.
      op: Average, Sum or Adasum.
      gradient_predivide_factor: gradients are divided by it before the sum and multiplied with it after.
      average_aggregated_gradients: the passes of a step are averaged; else summed.
      num_groups, groups: taken and checked. Gradients travel in buckets that change no number.
      process_set: whose ranks reduce; other ranks keep their own gradients.
      scale_local_gradients: gradients of local variables are divided by the number of ranks.
    """
    if isinstance(optimizer, tf.compat.v1.train.Optimizer):
        return hvd.DistributedOptimizer(
            optimizer,
            name=name,
            use_locking=use_locking,
            device_dense=device_dense,
            device_sparse=device_sparse,
            compression=compression,
            sparse_as_dense=sparse_as_dense,
            backward_passes_per_step=backward_passes_per_step,
            op=op,
            gradient_predivide_factor=gradient_predivide_factor,
            average_aggregated_gradients=average_aggregated_gradients,
            num_groups=num_groups,
            groups=groups,
            process_set=process_set,
            scale_local_gradients=scale_local_gradients,
        )
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


def PartialDistributedOptimizer(  # noqa: N802
    optimizer: keras.optimizers.Optimizer,
    name: str | None = None,
    device_dense: str = "",
    device_sparse: str = "",
    compression: Any = Compression.none,
    sparse_as_dense: bool = False,
    gradient_predivide_factor: float = 1.0,
    op: Any = hvd.Average,
    groups: Any = None,
    process_set: Any = hvd.global_process_set,
    local_layers: Any = None,
    scale_local_gradients: bool = True,
) -> keras.optimizers.Optimizer:
    """`DistributedOptimizer` that leaves the gradients of `local_layers` to each rank."""
    optimizer = wrap(
        optimizer,
        compression=compression,
        sparse_as_dense=sparse_as_dense,
        op=op,
        predivide=gradient_predivide_factor,
        groups=groups,
        process_set=process_set,
        scale_local=scale_local_gradients,
    )
    for variable in variables_of(local_layers):
        optimizer.register_local_var(variable)
    return optimizer


def wrap(
    optimizer: keras.optimizers.Optimizer,
    *,
    compression: Any,
    sparse_as_dense: bool,
    op: Any,
    predivide: float,
    process_set: Any,
    scale_local: bool,
    passes: int = 1,
    average: bool = False,
    num_groups: int = 0,
    groups: Any = None,
) -> keras.optimizers.Optimizer:
    """What all the functions above and in `keras` do."""
    if not isinstance(passes, int) or passes < 1:
        raise ConfigError(f"backward_passes_per_step={passes!r}: a whole number of 1 or more is wanted")
    if op == hvd.Adasum and average:
        raise ConfigError("Adasum does not support average_aggregated_gradients=True")
    make = functools.partial(
        make_reducer,
        compression=compression,
        sparse_as_dense=sparse_as_dense,
        op=op,
        predivide=predivide,
        groups=groups_from(num_groups, groups),
        process_set=process_set,
        scale_local=scale_local,
    )
    return distribute(optimizer, lambda: Part(make(), passes, average), _HorovodOptimizer)


def make_reducer(
    *,
    compression: Any,
    sparse_as_dense: bool,
    op: Any,
    predivide: float,
    groups: Any,
    process_set: Any,
    scale_local: bool,
    agreed: dict | None = None,
) -> LocalReducer:
    """A reducer with Horovod's options, which are checked here."""
    if op not in _OPS:
        raise ConfigError("op: use Average, Sum or Adasum")
    if predivide != 1.0 and op != hvd.Average:
        raise ConfigError("gradient_predivide_factor not supported with op != Average")
    if op == hvd.Adasum and process_set is not hvd.global_process_set:
        raise ConfigError("Adasum does not support process sets")
    if groups is not None and not isinstance(groups, list) and not (isinstance(groups, int) and groups > 0):
        raise ConfigError("groups should be a positive integer or a list of list of variables")
    comm = ProcessSetCommunicator(process_set, compression, predivide)
    check_op(_OPS[op], comm)
    return LocalReducer(comm, _OPS[op], sparse_as_dense=sparse_as_dense, scale_local=scale_local, agreed=agreed)


def groups_from(num_groups: int, groups: Any) -> Any:
    """`groups`, or what it was called before."""
    if num_groups:
        warnings.warn("Parameter `num_groups` has been replaced by `groups`", DeprecationWarning, stacklevel=4)
    return groups if groups is not None else (num_groups or None)


def variables_of(layers: Any) -> list[keras.Variable]:
    """Trainable variables of one layer or of several."""
    if layers is None:
        return []
    layers = [layers] if isinstance(layers, keras.Layer) else list(layers)
    if not all(isinstance(layer, keras.Layer) for layer in layers):
        raise ConfigError("All local layers must be of keras.layers.Layer type.")
    return [variable for layer in layers for variable in layer.trainable_variables]


class LocalReducer(Reducer):
    """A `Reducer` that knows variables which are this rank's own.

    Args:
      scale_local: whether their gradients are divided by the number of ranks.
    """

    def __init__(self, comm: ProcessSetCommunicator, op: str, *, scale_local: bool, **options: Any):
        # Ranks that join an elastic job later would ask while the others do not.
        super().__init__(comm, op, ask=not elastic_job(), **options)
        self._scale_local, self._local = scale_local, set()

    def register(self, variable: Variable) -> None:
        """From now on the variable is this rank's own."""
        self._local.add(key_of(variable))

    def is_local(self, variable: Variable) -> bool:
        """Whether the variable is this rank's own."""
        return key_of(variable) in self._local

    def align(self, gradients: Sequence[Gradient], variables: Sequence[Variable]) -> list[Gradient]:
        shared = [(g, v) for g, v in zip(gradients, variables, strict=True) if not self.is_local(v)]
        aligned = iter(super().align(*zip(*shared, strict=True)) if shared else [])
        return [
            as_kind(g, agreement.kind_of([g]), v) if self.is_local(v) else next(aligned)
            for g, v in zip(gradients, variables, strict=True)
        ]

    def reduce(self, gradients: Sequence[Gradient], variables: Sequence[Variable]) -> list[Gradient]:
        shared = [(g, v) for g, v in zip(gradients, variables, strict=True) if not self.is_local(v)]
        reduced = iter(super().reduce(*zip(*shared, strict=True)) if shared else [])
        return [self._own(g) if self.is_local(v) else next(reduced) for g, v in zip(gradients, variables, strict=True)]

    def divide(self, x: tf.Tensor) -> tf.Tensor:
        if elastic_job():
            return x / tf.cast(hvd.size_op(process_set_id=self.comm.process_set.process_set_id), x.dtype)
        return super().divide(x)

    def _own(self, gradient: Gradient) -> Gradient:
        return sparse.map_values(self.divide, gradient) if self._scale_local else gradient


class _HorovodOptimizer(Distributed):
    """What Horovod's optimizers know besides."""

    @property
    def variables(self) -> CallableList:
        return CallableList(super().variables)

    def register_local_var(self, var: Variable) -> None:
        """Leaves the gradient of a variable to this rank."""
        self._disttrain.reducer.register(var)
