"""Many processes, one replica each, over Horovod's tensor ops (Sergeev and Del Balso, Horovod, 2018): NCCL, MPI, Gloo.

Its Python layers for optimizers and tapes do not work with Keras 3, and are not used.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from disttrain.comm import buckets, devices, membership, order
from disttrain.comm.communicator import OPS
from disttrain.comm.connections import Connections
from disttrain.comm.one_replica import OneReplica
from disttrain.comm.watchdog import Watchdog
from disttrain.errors import BackendError, ConfigError
from disttrain.types import tf_variable
from disttrain.world import elastic_job, tell_launcher

# Types that its ops do not take; they travel as bytes.
_UNKNOWN = (tf.bfloat16, tf.uint32, tf.uint64)
# Elements up to which tensors of a bucket travel as one: 26 of them take 1.1 ms so, and 2.2 ms one by one.
_SMALL = 1 << 12

# In errors of its ops: "Horovod has been shut down", its name of an eager op, the name an op has got here, or a place in Gloo.
_LOST = ("Horovod", "{{node disttrain.", "/gloo/")


class HorovodCommunicator(OneReplica):
    """A group of one replica a process. See `Communicator`; started by mpirun, `all_reduce` knows the op "adasum" as well.

    Args:
      wire: how tensors are packed.
      stall_timeout: seconds; see `Watchdog`. None: no watchdog.

    Raises:
      BackendError: Horovod is not built, or there are fewer GPUs than ranks on this machine.
    """

    name = "horovod"

    def __init__(self, wire: buckets.Wire, stall_timeout: float | None):
        self._hvd, self._ops = _import()
        if stall_timeout:
            # Horovod's own guard knows tensors that some ranks have not sent, and not which rank is busy with a checkpoint. The
            # watchdog knows ranks, and comes first.
            os.environ.setdefault("HOROVOD_STALL_CHECK_TIME_SECONDS", str(max(1, int(stall_timeout / 2))))
            os.environ.setdefault("HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", str(10 * max(2, int(stall_timeout))))
        devices.yield_while_waiting()
        _do_not_copy_on_one_host()
        self.elastic = elastic_job()
        self._wire, self._stall_timeout, self._watchdog = wire, stall_timeout, None
        self._join_job()
        if self._hvd.mpi_enabled():  # Horovod's Adasum needs MPI
            self.ops = (*self.ops, "adasum")
        devices.claim(self._hvd.local_rank(), self._hvd.local_size())
        self._hosts = membership.Hosts() if self.elastic else None
        # What those that join do in `dt.init`, those that are here must do with them.
        self.on_regroup: Callable[[], None] = lambda: None
        self._take_place()

    def _join_job(self) -> None:
        if not self.elastic:
            self._hvd.init()
            return
        self._connections = Connections()
        with self._connections.opened():
            membership.join(self._hvd)

    def _take_place(self) -> None:
        self.rank, self.size, self.local_rank = self._hvd.rank(), self._hvd.size(), self._hvd.local_rank()
        self.is_chief = self.rank == 0
        if self.size > 1 and self._stall_timeout:
            survive = self._connections.cut if self.elastic else None
            self._watchdog = Watchdog(self.rank, self.all_gather_object, self._stall_timeout, survive)

    def all_reduce(self, tensors, op="sum"):
        if self.size == 1:
            return list(tensors)
        return buckets.all_reduce(self, self._wire, list(tensors), op)

    def reduce_scatter(self, tensor, op="sum"):
        if op not in ("sum", "mean") or tensor.dtype not in (tf.float32, tf.float64):
            (reduced,) = self.all_reduce([tensor], op)
            return tf.split(reduced, self.size)[self.rank]
        name = self._name("reduce_scatter", tensor)
        return self._ops._reducescatter(self.at_run_time(tensor), name=name, op=self._op(op), ignore_name_scope=True)

    def all_gather(self, tensor):
        if tensor.dtype in _UNKNOWN:
            return tf.bitcast(self.all_gather(tf.bitcast(tensor, tf.uint8)), tensor.dtype)
        return self._ops.allgather(self.at_run_time(tensor), name=self._name("all_gather"), ignore_name_scope=True)

    def broadcast(self, variables, root=0):
        self.check_root(root)
        for index, variable in enumerate(map(tf_variable, variables)):
            value = tf.bitcast(variable, tf.uint8) if variable.dtype in _UNKNOWN else variable
            value = self._ops.broadcast(value, root, name=f"disttrain.broadcast.{index}", ignore_name_scope=True)
            variable.assign(tf.bitcast(value, variable.dtype) if variable.dtype in _UNKNOWN else value)

    def all_gather_object(self, value):
        with self.waiting("all_gather_object"), tf.init_scope(), tf.device("CPU"):
            data = tf.constant(np.frombuffer(pickle.dumps(value), np.uint8))
            sizes = self.all_gather(tf.constant([len(data)])).numpy()
            parts = np.split(self.all_gather(data).numpy(), np.cumsum(sizes)[:-1])
            return [pickle.loads(part.tobytes()) for part in parts]

    def barrier(self):
        self.all_gather_object(None)

    def waiting(self, what):
        return self._watchdog.waiting(what) if self._watchdog else super().waiting(what)

    def busy(self, what):
        return self._watchdog.busy(what) if self._watchdog else super().busy(what)

    def close(self):
        self._leave()

    # An elastic job ---------------------------------------------------------------------------------------------------

    @property
    def hosts_changed(self):
        return self._hosts is not None and self._hosts.changed

    def lost(self, error):
        return self.elastic and any(word in str(error) for word in _LOST)

    def regroup(self):
        self._leave()
        self._hosts.changed = False
        self._join_job()
        self._take_place()
        tell_launcher({"rank": self.rank})
        self.on_regroup()

    def _leave(self) -> None:
        if self._watchdog:
            self._watchdog.close()
            self._watchdog = None
        self._hvd.shutdown()

    # What `buckets` asks for -----------------------------------------------------------------------------------------

    def start(self, tensors, op):
        if tensors[0].dtype == tf.bfloat16:
            return self._sum_of_bfloat16(tensors)
        small = [op in OPS and (x.shape.num_elements() or _SMALL + 1) <= _SMALL for x in tensors]
        if sum(small) < 2:
            return self._reduce(tensors, op)
        # Horovod handles tensors one by one, which takes longer than reducing a few numbers.
        together = [x for x, yes in zip(tensors, small, strict=True) if yes]
        large = [x for x, yes in zip(tensors, small, strict=True) if not yes]
        flat, *reduced = self._reduce([tf.concat([tf.reshape(x, [-1]) for x in together], 0), *large], op)
        parts, whole = iter(_cut(flat, together)), iter(reduced)
        return [next(parts) if yes else next(whole) for yes in small]

    def finish(self, handle):
        return handle

    def _reduce(self, tensors: list, op: str) -> list:
        options, tensors = self._options(op, *tensors), [self.at_run_time(tensors[0]), *tensors[1:]]
        if len(tensors) == 1:
            return [self._ops._allreduce(tensors[0], **options)]
        return self._ops._grouped_allreduce(tensors, **options)

    def _options(self, op: str, *tensors: tf.Tensor) -> dict[str, Any]:
        return {"name": self._name(op, *tensors), "op": self._op(op), "ignore_name_scope": True}

    def _sum_of_bfloat16(self, tensors: list) -> list:
        """Horovod's ops do not know the type: each rank gets its part of all ranks' bits, sums it, and shows it to all."""
        flat = tf.concat([tf.reshape(x, [-1]) for x in tensors], 0)
        part = -(-flat.shape[0] // self.size)
        flat = tf.pad(flat, [[0, part * self.size - flat.shape[0]]])
        bits = self.at_run_time(tf.bitcast(flat, tf.uint16))
        bits = self._ops.alltoall(bits, name=self._name("all_to_all", bits), ignore_name_scope=True)
        parts = tf.reshape(tf.bitcast(bits, tf.bfloat16), [self.size, part])
        mine = tf.cast(tf.reduce_sum(tf.cast(parts, tf.float32), axis=0), tf.bfloat16)
        whole = tf.bitcast(self.all_gather(tf.bitcast(mine, tf.uint16)), tf.bfloat16)
        return _cut(whole[: sum(x.shape.num_elements() for x in tensors)], tensors)

    def at_run_time(self, tensor: tf.Tensor) -> tf.Tensor:
        """The same, but certainly no constant.

        Horovod's ops do not say that they are more than functions of their inputs. Were all of these constants,
        TensorFlow would run the op while it prepares the graph, where this rank may be alone, and never again.
        """
        if tf.executing_eagerly():
            return tensor
        if tensor.shape.rank == 0:
            return tf.reshape(self.at_run_time(tf.reshape(tensor, [1])), [])
        # The whole, from a place that is known when the program runs: not copied, and not optimized away. A random number
        # from 0 to 0 is one, and unlike a variable can be made within a traced function.
        start = tf.raw_ops.RandomUniformInt(shape=tf.zeros([0], tf.int32), minval=0, maxval=1, seed=1, seed2=1)
        rank = tf.rank(tensor)
        whole = tf.slice(tensor, tf.fill([rank], start), tf.fill([rank], -1))
        whole.set_shape(tensor.shape)
        return whole

    def _name(self, kind: str, *tensors) -> str:
        """The same on all ranks for the same collective, and its own in every program: Horovod pairs tensors by name."""
        elements = sum(x.shape.num_elements() or 0 for x in tensors)
        return f"disttrain.{kind}.{order.number()}.{len(tensors)}.{elements}"

    def _op(self, op: str):
        hvd = self._hvd
        ops = {"sum": hvd.Sum, "mean": hvd.Average, "min": hvd.Min, "max": hvd.Max, "adasum": hvd.Adasum}
        if op not in ops:
            raise ConfigError(f"op={op!r}: use one of {', '.join(map(repr, ops))}")
        return ops[op]


def _cut(flat: tf.Tensor, like: list) -> list:
    """A flat tensor as tensors of the shapes of others."""
    pieces = tf.split(flat, [x.shape.num_elements() for x in like])
    return [tf.reshape(piece, x.shape) for piece, x in zip(pieces, like, strict=True)]


def _do_not_copy_on_one_host() -> None:
    """Horovod packs tensors into a buffer and back, to save messages. In shared memory that costs more than it saves.

    100 MB in 80 tensors, two ranks: 83 ms with its default of 64 MiB, 50 ms with 1 MiB, 62 ms for MPI alone.
    """
    one_host = any(
        os.environ.get(f"{name}_SIZE") == os.environ.get(f"{name}_LOCAL_SIZE", "")
        for name in ("OMPI_COMM_WORLD", "HOROVOD")
    )
    if one_host and not tf.config.list_physical_devices("GPU"):
        os.environ.setdefault("HOROVOD_FUSION_THRESHOLD", str(1 << 20))


def _import():
    try:
        import horovod.tensorflow as hvd
        from horovod.tensorflow import mpi_ops
    except ImportError as error:
        raise BackendError(
            f"backend 'horovod': Horovod cannot be imported ({error}): `disttrain build-horovod` builds and installs it"
        ) from None
    return hvd, mpi_ops
