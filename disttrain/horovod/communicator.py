"""The ranks of a process set, as what optimizers and tapes of this package reduce with."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from disttrain.comm import buckets
from disttrain.comm.communicator import OPS
from disttrain.comm.horovod import HorovodCommunicator
from disttrain.horovod import compression as compressions
from disttrain.horovod.compression import Compression
from disttrain.horovod.engine import elastic_job, hvd

# Horovod's ops of a process set that this rank is not in give back what they are given.
_ALONE = 1


class ProcessSetCommunicator(HorovodCommunicator):
    """A `Communicator` of the ranks in a process set. The script has called `init()`, and chosen its devices.

    Args:
      process_set: whose ranks reduce; a rank outside keeps its own gradients.
      compression: how dense tensors travel.
      predivide: factor that gradients are divided by before the sum, and multiplied with after it.
    """

    def __init__(
        self, process_set: Any = hvd.global_process_set, compression: Any = Compression.none, predivide: float = 1.0
    ):
        self._hvd, self._ops, self._watchdog = hvd, hvd.mpi_ops, None
        self.process_set, self._predivide = process_set, predivide
        # Its scales are for the number of ranks that there are; an elastic job may change it.
        narrow = compressions.is_fp16(compression) and not elastic_job()
        self._wire = buckets.Wire(wire_dtype="float16" if narrow else None)
        self._compression = None if narrow or compressions.is_none(compression) else compression

    @property
    def ops(self) -> tuple[str, ...]:
        return (*OPS, "adasum") if hvd.is_initialized() and hvd.mpi_enabled() else OPS

    @property
    def rank(self) -> int:
        return hvd.rank()

    @property
    def local_rank(self) -> int:
        return hvd.local_rank()

    @property
    def is_chief(self) -> bool:
        return hvd.rank() == 0

    @property
    def size(self) -> int:
        return self.process_set.size() if self._takes_part() else _ALONE

    def all_reduce(self, tensors, op="sum"):
        if self._takes_part() and (elastic_job() or self.size > 1):
            # Not asked how many ranks there are now: in an elastic job there may be more when the graph runs.
            return buckets.all_reduce(self, self._wire, list(tensors), op)
        return list(tensors)

    def all_gather(self, tensor):
        name = self._name("all_gather")
        if tensor.dtype == tf.bfloat16:  # which Horovod does not know
            return tf.cast(self.all_gather(tf.cast(tensor, tf.float32)), tensor.dtype)
        return hvd.allgather(self.at_run_time(tensor), name=name, ignore_name_scope=True, process_set=self.process_set)

    def start(self, tensors, op):
        if self._compression is not None:
            return [self._compressed(self.at_run_time(x), op) for x in tensors]
        return super().start(tensors, op)

    def _compressed(self, tensor: tf.Tensor, op: str) -> tf.Tensor:
        thin, context = self._compression.compress(tensor)
        return self._compression.decompress(self._ops._allreduce(thin, **self._options(op, thin)), context)

    def _options(self, op: str, *tensors: tf.Tensor) -> dict[str, Any]:
        factor = self._predivide if op == "mean" else 1.0
        scales = {"prescale_factor": 1.0 / factor, "postscale_factor": factor}
        return super()._options(op, *tensors) | scales | {"process_set": self.process_set}

    def _takes_part(self) -> bool:
        return self.process_set is hvd.global_process_set or bool(self.process_set.included())
