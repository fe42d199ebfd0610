"""Many processes, one replica each, over MPI by way of mpi4py.

Gradients are packed once, into flat buffers that are kept from step to step; MPI sums in place, and the tensors that come
back are windows on the same memory. A thread of its own waits in MPI, so that the backward pass goes on meanwhile.
"""

from __future__ import annotations

import math
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import ml_dtypes
import numpy as np
import tensorflow as tf

from disttrain.comm import buckets, devices, order
from disttrain.comm.one_replica import OneReplica
from disttrain.comm.watchdog import Watchdog
from disttrain.errors import BackendError, ConfigError
from disttrain.types import tf_variable

# Bytes at which a tensor begins in a buffer, so that TensorFlow takes the window as it is, without a copy.
_ALIGNMENT = 64


class MpiCommunicator(OneReplica):
    """A group of one replica a process. See `Communicator`.

    Args:
      wire: how tensors are packed.
      stall_timeout: seconds; see `Watchdog`. None: no watchdog.

    Raises:
      BackendError: mpi4py or an MPI library is missing, the library cannot be called from a second thread, or there are
        fewer GPUs than ranks on this machine.
    """

    name = "mpi"

    def __init__(self, wire: buckets.Wire, stall_timeout: float | None):
        self._MPI = _import()
        world = self._MPI.COMM_WORLD
        self._comm, self._wire = world.Dup(), wire
        self.rank, self.size = world.Get_rank(), world.Get_size()
        local = world.Split_type(self._MPI.COMM_TYPE_SHARED)
        self.local_rank, self.is_chief = local.Get_rank(), self.rank == 0
        devices.claim(self.local_rank, local.Get_size())
        self._thread = ThreadPoolExecutor(1, "disttrain-mpi")
        self._pool, self._in_flight, self._tickets = _Pool(), {}, 0
        self._half_sums = {dtype: _half_sum(self._MPI, dtype) for dtype in (np.float16, ml_dtypes.bfloat16)}
        self._watchdog = None
        if self.size > 1 and stall_timeout:
            self._watchdog = Watchdog(self.rank, self.all_gather_object, stall_timeout)

    def all_reduce(self, tensors, op="sum"):
        if self.size == 1:
            return list(tensors)
        return buckets.all_reduce(self, self._wire, list(tensors), op)

    def reduce_scatter(self, tensor, op="sum"):
        if tensor.dtype not in (tf.float32, tf.float64):  # `all_reduce` sums halves wide, and divides whole numbers
            (reduced,) = self.all_reduce([tensor], op)
            return tf.split(reduced, self.size)[self.rank]
        shape = [tensor.shape[0] // self.size, *tensor.shape[1:]] if tensor.shape[0] else [None, *tensor.shape[1:]]

        def reduce(x: np.ndarray) -> np.ndarray:
            out = np.empty([len(x) // self.size, *x.shape[1:]], x.dtype)
            self._do(self._comm.Reduce_scatter_block, x, out, self._op(op))
            return out / np.array(self.size, x.dtype) if op == "mean" else out

        return self._in_order(reduce, [tensor], tensor.dtype, shape)

    def all_gather(self, tensor):
        def gather(x: np.ndarray) -> np.ndarray:
            counts = self._do(self._comm.allgather, len(x))
            out = np.empty([sum(counts), *x.shape[1:]], x.dtype)
            row = math.prod(x.shape[1:]) * x.itemsize
            sizes = [n * row for n in counts]
            self._do(self._comm.Allgatherv, _bytes(x), [_bytes(out), sizes])
            return out

        return self._in_order(gather, [tensor], tensor.dtype, [None, *tensor.shape[1:]])

    def broadcast(self, variables, root=0):
        self.check_root(root)
        for variable in map(tf_variable, variables):
            value = np.array(variable.numpy(), order="C")
            self._do(self._comm.Bcast, _bytes(value), root)
            variable.assign(value)

    def all_gather_object(self, value):
        with self.waiting("all_gather_object"):
            return self._do(self._comm.allgather, value)

    def barrier(self):
        with self.waiting("barrier"):
            self._do(self._comm.Barrier)

    def waiting(self, what):
        return self._watchdog.waiting(what) if self._watchdog else super().waiting(what)

    def busy(self, what):
        return self._watchdog.busy(what) if self._watchdog else super().busy(what)

    def close(self):
        if self._watchdog:
            self._watchdog.close()
        self._thread.shutdown()
        if self._comm:  # null once it is freed
            self._comm.Free()

    # What `buckets` asks for -----------------------------------------------------------------------------------------

    def start(self, tensors, op):
        op_code = self._op(op)
        ticket = self._in_order(lambda *arrays: self._begin(arrays, op_code), tensors, tf.int64, [])
        return ticket, tensors, op

    def finish(self, handle):
        ticket, tensors, op = handle
        with order.after_the_last() as note:
            reduced = tf.nest.flatten(tf.numpy_function(self._end, [ticket], [x.dtype for x in tensors]))
            note(reduced[0])
        for x, like in zip(reduced, tensors, strict=True):
            x.set_shape(like.shape)
        return [x / tf.cast(self.size, x.dtype) for x in reduced] if op == "mean" else reduced

    def _begin(self, arrays: tuple[np.ndarray, ...], op) -> np.int64:
        """Packs arrays into a buffer and leaves it to MPI's thread; returns a ticket for what comes back."""
        buffer = self._pool.take(arrays)
        self._tickets += 1
        self._in_flight[self._tickets] = _InFlight(buffer, self._thread.submit(self._reduce, buffer.flat, op))
        return np.int64(self._tickets)

    def _end(self, ticket: np.int64) -> list[np.ndarray]:
        buffer, future = self._in_flight.pop(int(ticket))
        future.result()
        return buffer.views

    def _reduce(self, flat: np.ndarray, op) -> None:
        if flat.dtype.type in self._half_sums:
            kind, add = self._half_sums[flat.dtype.type]
            self._comm.Allreduce(self._MPI.IN_PLACE, [flat.view(np.uint16), kind], add)
        else:
            self._comm.Allreduce(self._MPI.IN_PLACE, flat, op)

    def _do(self, call, *args):
        """Calls MPI in its thread, which keeps the order, and waits."""
        return self._thread.submit(call, *args).result()

    def _in_order(self, fn, tensors, dtype, shape):
        with order.after_the_last() as note:
            result = tf.numpy_function(fn, tensors, dtype)
            note(result)
        result.set_shape(shape)
        return result

    def _op(self, op: str):
        MPI = self._MPI
        ops = {"sum": MPI.SUM, "mean": MPI.SUM, "min": MPI.MIN, "max": MPI.MAX}
        if op not in ops:
            raise ConfigError(f"op={op!r}: use one of {', '.join(map(repr, ops))}")
        return ops[op]


class _Buffer(NamedTuple):
    flat: np.ndarray
    views: list[np.ndarray]


class _InFlight(NamedTuple):
    buffer: _Buffer
    future: Future


class _Pool:
    """Flat buffers by layout. One is free when nobody holds a window on it any more, TensorFlow included."""

    def __init__(self):
        self._flats: dict[tuple, list[np.ndarray]] = {}

    def take(self, arrays: tuple[np.ndarray, ...]) -> _Buffer:
        """A buffer that holds the arrays, one after the other, each with a window of its shape."""
        dtype = arrays[0].dtype
        step = max(1, _ALIGNMENT // dtype.itemsize)
        starts = np.cumsum([0] + [-(-x.size // step) * step for x in arrays])
        flat = self._free(int(starts[-1]), dtype)
        views = [flat[a : a + x.size].reshape(x.shape) for a, x in zip(starts, arrays)]  # noqa: B905
        for view, x in zip(views, arrays, strict=True):
            np.copyto(view, x)
        return _Buffer(flat, views)

    def _free(self, size: int, dtype: np.dtype) -> np.ndarray:
        flats = self._flats.setdefault((size, dtype), [])
        for flat in flats:
            if sys.getrefcount(flat) == 3:  # the pool's list, this loop, and getrefcount's own argument
                return flat
        flats.append(_aligned(size, dtype))
        return flats[-1]


def _aligned(size: int, dtype: np.dtype) -> np.ndarray:
    """An array of its own, not a view, whose memory begins at a multiple of the alignment."""
    raw = np.zeros(size * dtype.itemsize + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return np.frombuffer(memoryview(raw)[start : start + size * dtype.itemsize], dtype)


def _bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _half_sum(MPI, dtype) -> tuple:
    """MPI's type and operation for sums of half precision, which it does not have itself."""

    def add(left, right, _):
        out = np.frombuffer(right, dtype)
        np.add(np.frombuffer(left, dtype), out, out=out)

    return MPI.UINT16_T, MPI.Op.Create(add, commute=True)


def _import():
    devices.yield_while_waiting()
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise BackendError(
            f"backend 'mpi': mpi4py cannot be used ({error}): pip install 'disttrain[mpi]' brings it and Open MPI"
        ) from None
    if MPI.Query_thread() < MPI.THREAD_SERIALIZED:
        raise BackendError(
            "backend 'mpi': this MPI library was started without support for threads (level "
            f"{MPI.Query_thread()}, MPI_THREAD_SERIALIZED is needed): use one built with it, as Open MPI from PyPI is, and "
            "do not set mpi4py.rc.thread_level"
        )
    return MPI
