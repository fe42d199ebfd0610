"""Reductions and gathers of tensors. Horovod's ops and signatures; what differs is said in each docstring.

Keras variables are taken everywhere. Types that Horovod does not know travel as ones that it does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from disttrain.horovod import compression as compressions
from disttrain.horovod.communicator import ProcessSetCommunicator
from disttrain.horovod.compression import Compression
from disttrain.horovod.engine import hvd, plain, takes_keras

global_process_set = hvd.global_process_set

alltoall = takes_keras(hvd.alltoall)
broadcast_ = takes_keras(hvd.broadcast_)
join = hvd.join
reducescatter = takes_keras(hvd.reducescatter)


def allreduce(
    tensor: Any,
    average: bool | None = None,
    device_dense: str = "",
    device_sparse: str = "",
    compression: Any = Compression.none,
    op: Any = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    name: str | None = None,
    process_set: Any = global_process_set,
    ignore_name_scope: bool = False,
) -> tf.Tensor | tf.IndexedSlices:
    """Reduces a tensor or IndexedSlices over ranks; by default their average.

    `Compression.fp16` scales by the largest element on any rank, so that nothing overflows, and leaves tensors of less
    than 16384 elements in float32.
    """
    tensor = _as_tensor(tensor)
    op = hvd.handle_average_backwards_compatibility(op, average)
    if _travels_narrow(compression, op) and not isinstance(tensor, tf.IndexedSlices):
        (reduced,) = _narrow([tensor], op, process_set, prescale_factor, postscale_factor)
        return reduced
    return _in_known_dtype(
        lambda x: hvd.allreduce(
            x,
            device_dense=device_dense,
            device_sparse=device_sparse,
            compression=_known(compression),
            op=op,
            prescale_factor=prescale_factor,
            postscale_factor=postscale_factor,
            name=name,
            process_set=process_set,
            ignore_name_scope=ignore_name_scope,
        ),
        tensor,
    )


def grouped_allreduce(
    tensors: Sequence[Any],
    average: bool | None = None,
    device_dense: str = "",
    device_sparse: str = "",
    compression: Any = Compression.none,
    op: Any = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: Any = global_process_set,
    ignore_name_scope: bool = False,
    name: str | None = None,
) -> list:
    """Reduces many tensors at once. Dense tensors, IndexedSlices and dtypes may be mixed."""
    tensors = [_as_tensor(x) for x in tensors]
    op = hvd.handle_average_backwards_compatibility(op, average)
    options = {
        "device_dense": device_dense,
        "device_sparse": device_sparse,
        "op": op,
        "prescale_factor": prescale_factor,
        "postscale_factor": postscale_factor,
        "process_set": process_set,
        "ignore_name_scope": ignore_name_scope,
    }
    results: list = [None] * len(tensors)
    for number, places in enumerate(_alike(tensors)):
        group, group_name = [tensors[i] for i in places], f"{name}.{number}" if name and number else name
        if isinstance(group[0], tf.IndexedSlices) or group[0].dtype == tf.bfloat16:
            reduced = [allreduce(x, compression=compression, **options) for x in group]
        elif _travels_narrow(compression, op):
            reduced = _narrow(group, op, process_set, prescale_factor, postscale_factor)
        else:
            reduced = hvd.grouped_allreduce(group, compression=_known(compression), name=group_name, **options)
        for i, x in zip(places, reduced, strict=True):
            results[i] = x
    return results


def allgather(
    tensor: Any, name: str | None = None, ignore_name_scope: bool = False, process_set: Any = global_process_set
) -> tf.Tensor:
    """Concatenates along the first dimension, in which ranks may differ."""
    return _in_known_dtype(
        lambda x: hvd.allgather(x, name=name, ignore_name_scope=ignore_name_scope, process_set=process_set),
        _as_tensor(tensor),
    )


def grouped_allgather(
    tensors: Sequence[Any],
    name: str | None = None,
    ignore_name_scope: bool = False,
    process_set: Any = global_process_set,
) -> list[tf.Tensor]:
    """Gathers many tensors at once; dtypes may be mixed."""
    tensors = [_as_tensor(x) for x in tensors]
    results: list = [None] * len(tensors)
    for number, places in enumerate(_alike(tensors)):
        group, group_name = [tensors[i] for i in places], f"{name}.{number}" if name and number else name
        dtype = group[0].dtype
        gathered = hvd.grouped_allgather(
            [_widen(x) for x in group], name=group_name, ignore_name_scope=ignore_name_scope, process_set=process_set
        )
        for i, x in zip(places, gathered, strict=True):
            results[i] = tf.cast(x, dtype)
    return results


def broadcast(
    tensor: Any,
    root_rank: int,
    name: str | None = None,
    ignore_name_scope: bool = False,
    process_set: Any = global_process_set,
) -> tf.Tensor:
    """The value that rank `root_rank` has."""
    tensor = _as_tensor(tensor)
    known = tensor if tensor.dtype in _BROADCAST_KNOWS else tf.bitcast(tensor, tf.uint8)
    value = hvd.broadcast(known, root_rank, name=name, ignore_name_scope=ignore_name_scope, process_set=process_set)
    return value if known is tensor else tf.bitcast(value, tensor.dtype)


def grouped_reducescatter(
    tensors: Sequence[Any],
    device_dense: str = "",
    compression: Any = Compression.none,
    op: Any = hvd.Average,
    process_set: Any = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> list[tf.Tensor]:
    """Reduces many tensors and gives each rank its part of their first dimension."""
    return hvd.grouped_reducescatter(
        plain(list(tensors)),
        device_dense=device_dense,
        compression=compression,
        op=op,
        process_set=process_set,
        prescale_factor=prescale_factor,
        postscale_factor=postscale_factor,
    )


_BROADCAST_KNOWS = (
    *(tf.uint8, tf.int8, tf.uint16, tf.int16, tf.int32, tf.int64),
    *(tf.float16, tf.float32, tf.float64, tf.bool),
)


def _as_tensor(value: Any) -> Any:
    value = plain(value)
    known = isinstance(value, tf.Variable | tf.IndexedSlices) or tf.is_tensor(value)
    return value if known else tf.convert_to_tensor(value)


def _alike(tensors: Sequence[Any]) -> list[list[int]]:
    """Places of tensors that can travel together: of one dtype, IndexedSlices apart."""
    groups: dict[tuple, list[int]] = {}
    for i, x in enumerate(tensors):
        groups.setdefault((isinstance(x, tf.IndexedSlices), x.dtype), []).append(i)
    return list(groups.values())


def _in_known_dtype(fn: Callable, tensor: Any) -> Any:
    """Lets bfloat16, which Horovod does not know, travel as float32."""
    if tensor.dtype != tf.bfloat16:
        return fn(tensor)
    result = fn(_widen(tensor))
    if isinstance(result, tf.IndexedSlices):
        return tf.IndexedSlices(tf.cast(result.values, tf.bfloat16), result.indices, result.dense_shape)
    return tf.cast(result, tf.bfloat16)


def _widen(tensor: Any) -> Any:
    if tensor.dtype != tf.bfloat16:
        return tensor
    if isinstance(tensor, tf.IndexedSlices):
        return tf.IndexedSlices(tf.cast(tensor.values, tf.float32), tensor.indices, tensor.dense_shape)
    return tf.cast(tensor, tf.float32)


def _travels_narrow(compression: Any, op: Any) -> bool:
    return compressions.is_fp16(compression) and op in (hvd.Average, hvd.Sum)


def _known(compression: Any) -> Any:
    # Of float16, minima and maxima need no scale, and products would be scaled once for each rank.
    return Compression.none if compressions.is_fp16(compression) else compression


def _narrow(tensors: list, op: Any, process_set: Any, before: float, after: float) -> list[tf.Tensor]:
    comm = ProcessSetCommunicator(process_set, Compression.fp16)
    scaled = [x if before == 1.0 else x * tf.cast(before, x.dtype) for x in map(tf.convert_to_tensor, tensors)]
    reduced = comm.all_reduce(scaled, "sum" if op == hvd.Sum else "mean")
    return [x if after == 1.0 else x * tf.cast(after, x.dtype) for x in reduced]
