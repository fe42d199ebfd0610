"""One process, one device: nothing to send. The engine that every other one is measured against."""

from __future__ import annotations

import contextlib

import tensorflow as tf

from disttrain.comm import shares
from disttrain.errors import BackendError
from disttrain.types import tf_variable


class LocalCommunicator:
    """A group of one replica. See `Communicator`."""

    name = "local"
    rank = 0
    size = 1
    local_rank = 0
    is_chief = True

    def scope(self):
        return contextlib.nullcontext()

    def owns(self, variable):
        return not isinstance(tf_variable(variable), tf.distribute.DistributedValues)

    def run(self, fn, args=(), *, fused=False):
        return tf.function(fn, jit_compile=True, autograph=False)(*args) if fused else fn(*args)

    def replica_id(self):
        return 0

    def per_replica(self, values):
        (value,) = values
        return value

    def local_values(self, value):
        return [value]

    def local_shares(self, batch):
        return shares.split(batch, 1)

    def distribute(self, dataset):
        return shares.DistributedBatches(dataset, shares.as_tensors)

    def all_reduce(self, tensors, op="sum"):
        return list(tensors)

    def reduce_scatter(self, tensor, op="sum"):
        return tensor

    def all_gather(self, tensor):
        return tensor

    def broadcast(self, variables, root=0):
        if root != 0:
            raise BackendError(f"broadcast: there is no rank {root} in a group of 1")

    def all_gather_object(self, value):
        return [value]

    def barrier(self):
        pass

    def close(self):
        pass
