"""One process, several devices: `tf.distribute.MirroredStrategy`."""

from __future__ import annotations

import contextlib

import tensorflow as tf

from disttrain.comm import shares
from disttrain.comm.communicator import OPS
from disttrain.errors import BackendError
from disttrain.types import tf_variable


class MirroredCommunicator:
    """A group of replicas on the devices of this machine. See `Communicator`.

    Args:
      replicas: number of devices. GPUs where there are any, else logical CPU devices. Default: every GPU, or two
        logical CPU devices.

    Raises:
      BackendError: more replicas than GPUs, or TensorFlow has already started with too few logical CPU devices.
    """

    name = "mirrored"
    rank = 0
    local_rank = 0
    is_chief = True
    ops = OPS
    elastic = False

    def __init__(self, replicas: int | None = None):
        self._devices = _choose_devices(replicas)
        self._strategy = tf.distribute.MirroredStrategy(self._devices, _cross_device_ops(self._devices))
        self.size = len(self._devices)

    def scope(self):
        return self._strategy.scope()

    def owns(self, variable):
        return self._strategy.extended.variable_created_in_scope(tf_variable(variable))

    def run(self, fn, args=(), *, fused=False):
        # Never fused: variables of several devices are updated by merge_call, which XLA does not know.
        return self._strategy.run(fn, args)

    def replica_id(self):
        return int(tf.get_static_value(_context().replica_id_in_sync_group))

    def per_replica(self, values):
        if len(values) != self.size:
            raise BackendError(f"per_replica: {len(values)} values for {self.size} replicas")
        # Copied to its device here, while the step before is still running, not at the start of the next one.
        return self._strategy.experimental_distribute_values_from_function(
            lambda context: _place(
                values[context.replica_id_in_sync_group], self._devices[context.replica_id_in_sync_group]
            )
        )

    def local_values(self, value):
        leaves = [self._by_replica(leaf) for leaf in tf.nest.flatten(value)]
        return [tf.nest.pack_sequence_as(value, [leaf[i] for leaf in leaves]) for i in range(self.size)]

    def local_shares(self, batch):
        if any(isinstance(leaf, tf.distribute.DistributedValues) for leaf in tf.nest.flatten(batch)):
            values = self.local_values(batch)
            for value in values:
                shares.count_examples(value)
            return values
        return shares.split(batch, self.size)

    def distribute(self, dataset):
        return shares.DistributedBatches(dataset, lambda batch: self.per_replica(shares.split(batch, self.size)))

    def all_reduce(self, tensors, op="sum"):
        if op in ("sum", "mean"):
            return list(_context().all_reduce(op.upper(), list(tensors))) if tensors else []
        extreme = {"min": tf.reduce_min, "max": tf.reduce_max}[op]
        return [extreme(self.all_gather(tensor[tf.newaxis]), axis=0) for tensor in tensors]

    def reduce_scatter(self, tensor, op="sum"):
        (reduced,) = self.all_reduce([tensor], op)
        return tf.split(reduced, self.size)[self.replica_id()]

    def all_gather(self, tensor):
        return _context().all_gather(tensor, axis=0)

    def broadcast(self, variables, root=0):
        # Mirrored variables start equal and stay equal: one process made them all.
        if not 0 <= root < self.size:
            raise BackendError(f"broadcast: there is no rank {root} in a group of {self.size}")

    def all_gather_object(self, value):
        return [value]

    def barrier(self):
        pass

    def waiting(self, what):
        return contextlib.nullcontext()

    def busy(self, what):
        return contextlib.nullcontext()

    def lost(self, error):
        return False

    def close(self):
        pass

    def _by_replica(self, leaf):
        if isinstance(leaf, tf.distribute.DistributedValues):
            return self._strategy.experimental_local_results(leaf)
        return (leaf,) * self.size  # the same on all, such as None


def _context():
    return tf.distribute.get_replica_context()


def _place(batch, device):
    with tf.device(device):
        return tf.nest.map_structure(tf.identity, batch)


def _cross_device_ops(devices: list[str]) -> tf.distribute.CrossDeviceOps | None:
    """TensorFlow's default: NCCL on GPUs. Between logical CPUs, which share memory, its default is ten times slower
    than adding up on one of them, and refuses a second group of another size in the same process."""
    return None if devices[0].startswith("GPU") else tf.distribute.ReductionToOneDevice()


def _choose_devices(replicas: int | None) -> list[str]:
    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        if replicas is not None and replicas > len(gpus):
            raise BackendError(
                f"{replicas} replicas asked for, {len(gpus)} GPUs visible: ask for {len(gpus)} or fewer, "
                "or set CUDA_VISIBLE_DEVICES= (empty) to train on logical CPU devices"
            )
        return [f"GPU:{i}" for i in range(replicas or len(gpus))]
    replicas = replicas or 2
    _make_logical_cpus(replicas)
    return [f"CPU:{i}" for i in range(replicas)]


def _make_logical_cpus(count: int) -> None:
    cpu = tf.config.list_physical_devices("CPU")[0]
    try:
        if len(tf.config.get_logical_device_configuration(cpu) or []) < count:
            tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * count)
    except RuntimeError:
        raise BackendError(
            f"{count} replicas need {count} logical CPU devices, but TensorFlow has already started with "
            f"{len(tf.config.list_logical_devices('CPU'))}: call dt.init before anything else uses TensorFlow"
        ) from None
