"""One process, one device: nothing to send. The engine that every other one is measured against."""

from __future__ import annotations

from disttrain.comm.one_replica import OneReplica


class LocalCommunicator(OneReplica):
    """A group of one replica. See `Communicator`."""

    name = "local"
    local_rank = 0
    is_chief = True

    def all_reduce(self, tensors, op="sum"):
        return list(tensors)

    def reduce_scatter(self, tensor, op="sum"):
        return tensor

    def all_gather(self, tensor):
        return tensor

    def broadcast(self, variables, root=0):
        self.check_root(root)

    def all_gather_object(self, value):
        return [value]

    def barrier(self):
        pass

    def close(self):
        pass
