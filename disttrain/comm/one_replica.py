"""What every engine does the same way in which a process is one replica."""

from __future__ import annotations

import contextlib

import tensorflow as tf

from disttrain.comm import shares
from disttrain.comm.communicator import OPS
from disttrain.errors import BackendError
from disttrain.types import tf_variable


class OneReplica:
    """The part of `Communicator` that is about this process alone. The engines below add how replicas talk."""

    rank = 0
    size = 1
    ops = OPS
    elastic = False

    def scope(self):
        return contextlib.nullcontext()

    def owns(self, variable):
        return not isinstance(tf_variable(variable), tf.distribute.DistributedValues)

    def run(self, fn, args=(), *, fused=False):
        return tf.function(fn, jit_compile=True, autograph=False)(*args) if fused else fn(*args)

    def replica_id(self):
        return self.rank

    def per_replica(self, values):
        if len(values) != 1:
            raise BackendError(f"per_replica: {len(values)} values for the one replica of this process")
        return values[0]

    def local_values(self, value):
        return [value]

    def local_shares(self, batch):
        return shares.split(batch, 1)

    def distribute(self, dataset):
        return shares.distribute(dataset, self.rank, self.size)

    def waiting(self, what):
        return contextlib.nullcontext()

    def busy(self, what):
        return contextlib.nullcontext()

    def lost(self, error):
        return False

    def check_root(self, root):
        if not 0 <= root < self.size:
            raise BackendError(f"broadcast: there is no rank {root} in a group of {self.size}")
