"""Many processes, one replica each, over `tf.distribute.MultiWorkerMirroredStrategy`: gRPC, or NCCL between GPUs.

The cluster is what `TF_CONFIG`, DISTTRAIN_HOSTS, Slurm or torchrun's variables say. Tensors travel by TensorFlow's
collectives; objects by the key-value store of its coordination service, so that ranks can talk while a function is being
traced.
"""

from __future__ import annotations

import base64
import collections
import functools
import json
import math
import os
import pickle
import time
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from tensorflow.python.distribute import mirrored_strategy
from tensorflow.python.distribute.cluster_resolver import slurm_cluster_resolver
from tensorflow.python.eager import context

from disttrain.comm import buckets, devices, rendezvous
from disttrain.comm.one_replica import OneReplica
from disttrain.comm.watchdog import Watchdog
from disttrain.errors import BackendError, ConfigError
from disttrain.types import tf_variable
from disttrain.world import World, world

# Types that TensorFlow gathers; others travel as one of these.
_GATHERED = (tf.float16, tf.float32, tf.float64, tf.int32, tf.int64)
# Of rank 0 under Slurm; the other ranks follow. Each job takes others in this range, which ends below the kernel's own ports.
_SLURM_PORTS = range(10000, 30000)
_SLURM_PORTS_APART = 128
# One look at the store. Short, since Python stands still meanwhile, the watchdog's thread included.
_POLL_MS = 500


class MultiWorkerCommunicator(OneReplica):
    """A group of one replica a process. See `Communicator`.

    Args:
      wire: how tensors are packed.
      stall_timeout: seconds; see `Watchdog`. None: no watchdog.

    Raises:
      BackendError: nothing describes a cluster, the description is not right, TensorFlow has already started, or there are
        fewer GPUs than workers on this machine.
    """

    name = "multiworker"

    def __init__(self, wire: buckets.Wire, stall_timeout: float | None):
        cluster = _cluster()
        hosts = [address.rpartition(":")[0] for address in cluster.workers]
        self.local_rank = hosts[: cluster.rank].count(hosts[cluster.rank])
        devices.claim(self.local_rank, hosts.count(hosts[cluster.rank]))
        self._strategy, self._wire = _strategy(cluster), wire
        self.rank, self.size, self.is_chief = cluster.rank, len(cluster.workers), cluster.rank == 0
        self._exchanges, self._timeout, self._watchdog, self._left = 0, stall_timeout, None, False
        if self.size > 1 and stall_timeout:
            self._watchdog = Watchdog(self.rank, self.all_gather_object, stall_timeout)

    def scope(self):
        return self._strategy.scope()

    def owns(self, variable):
        return self._strategy.extended.variable_created_in_scope(tf_variable(variable))

    def run(self, fn, args=(), *, fused=False):
        # Never fused: the strategy updates its variables by merge_call, which XLA does not know.
        return self._strategy.run(fn, args)

    def all_reduce(self, tensors, op="sum"):
        if op not in self.ops:
            raise ConfigError(f"op={op!r}: use one of {', '.join(map(repr, self.ops))}")
        return buckets.all_reduce(self, self._wire, list(tensors), op)

    def reduce_scatter(self, tensor, op="sum"):
        (reduced,) = self.all_reduce([tensor], op)
        return tf.split(reduced, self.size)[self.rank]

    def all_gather(self, tensor):
        if tensor.dtype not in _GATHERED:
            if tensor.dtype.size == 1:
                return tf.cast(self.all_gather(tf.cast(tensor, tf.int32)), tensor.dtype)
            same_bits = {2: tf.float16, 4: tf.int32, 8: tf.int64}[tensor.dtype.size]
            return tf.bitcast(self.all_gather(tf.bitcast(tensor, same_bits)), tensor.dtype)
        # Where no replica has a row TensorFlow crashes: one that has none sends one, which is taken out again.
        rows = tf.shape(tensor)[0]
        padding = [[0, tf.cast(rows == 0, tf.int32)], *[[0, 0]] * (tensor.shape.rank - 1)]
        counts = _replica().all_gather(rows[tf.newaxis], axis=0)
        whole = _replica().all_gather(tf.pad(tensor, padding), axis=0)
        return tf.boolean_mask(whole, tf.repeat(counts > 0, tf.maximum(counts, 1)))

    def broadcast(self, variables, root=0):
        self.check_root(root)
        for variable in map(tf_variable, variables):
            value = variable.numpy()
            # Whole words of the root's bytes, and zeros from all others, add up to the root's bytes.
            words = np.zeros(-(-value.nbytes // 4), np.int32)
            if self.rank == root:
                words.view(np.uint8)[: value.nbytes] = np.frombuffer(value.tobytes(), np.uint8)
            (words,) = self.run(lambda words=words: self.all_reduce([tf.constant(words)]))
            data = words.numpy().tobytes()[: value.nbytes]
            variable.assign(np.frombuffer(data, value.dtype).reshape(value.shape))

    def all_gather_object(self, value):
        self._exchanges += 1
        with self.waiting("all_gather_object"), tf.init_scope():
            store = context.context()
            store.set_config_key_value(self._key(self.rank), base64.b64encode(pickle.dumps(value)).decode())
            values = [pickle.loads(base64.b64decode(self._get(store, rank))) for rank in range(self.size)]
            if self._exchanges > 2:
                # All have read the one before the last, or they had not come to the last.
                store.delete_config_key_value(self._key(self.rank, self._exchanges - 2))
        return values

    def barrier(self):
        self.all_gather_object(None)

    def waiting(self, what):
        return self._watchdog.waiting(what) if self._watchdog else super().waiting(what)

    def busy(self, what):
        return self._watchdog.busy(what) if self._watchdog else super().busy(what)

    def close(self):
        if self._left:
            return
        self._left = True
        self.barrier()
        if self._watchdog:
            self._watchdog.close()

    # What `buckets` asks for -----------------------------------------------------------------------------------------

    def start(self, tensors, op):
        # One tensor for the whole bucket: TensorFlow's own packing is for GPUs alone.
        sizes = [x.shape.num_elements() for x in tensors]
        flat = tf.concat([tf.reshape(x, [-1]) for x in tensors], 0)
        if op in ("min", "max"):
            extreme = {"min": tf.reduce_min, "max": tf.reduce_max}[op]
            reduced = extreme(_replica().all_gather(flat[tf.newaxis], axis=0), axis=0)
        else:
            reduced = _replica().all_reduce(op.upper(), flat)
        parts = tf.split(reduced, sizes)
        return [tf.reshape(part, x.shape) for part, x in zip(parts, tensors, strict=True)]

    def finish(self, handle):
        return handle

    def _key(self, rank: int, exchange: int | None = None) -> str:
        return f"disttrain/{exchange or self._exchanges}/{rank}"

    def _get(self, store, rank: int) -> str:
        # Once there is a watchdog it knows better: a rank that does not come may be busy.
        until = math.inf if self._watchdog else time.monotonic() + (self._timeout or 600)
        while True:
            try:
                return store.get_config_key_value(self._key(rank), _POLL_MS)
            except tf.errors.DeadlineExceededError:
                if time.monotonic() > until:
                    raise BackendError(
                        f"rank {rank} has not answered for {self._timeout:g} s: is it running?"
                    ) from None


class _Cluster(NamedTuple):
    """Workers by rank, as host:port, and which of them this is."""

    workers: list[str]
    rank: int
    resolver: tf.distribute.cluster_resolver.ClusterResolver


def _replica():
    return tf.distribute.get_replica_context()


def _strategy(cluster: _Cluster) -> tf.distribute.MultiWorkerMirroredStrategy:
    on_gpu = bool(tf.config.list_physical_devices("GPU"))
    kinds = tf.distribute.experimental.CommunicationImplementation
    options = tf.distribute.experimental.CommunicationOptions(implementation=kinds.NCCL if on_gpu else kinds.RING)
    try:
        strategy = tf.distribute.MultiWorkerMirroredStrategy(cluster.resolver, options)
    except RuntimeError as error:
        if "program startup" not in str(error):
            raise
        raise BackendError(
            "backend 'multiworker': TensorFlow has already started: call dt.init before anything else uses TensorFlow"
        ) from None
    # Each rank makes its variables alone, as with every other engine; `broadcast` makes them equal. The strategy would
    # copy each from rank 0 as it is made, and crash or wait where the ranks' models differ, before anybody can say so.
    extended, alone = strategy.extended, mirrored_strategy.MirroredExtended._get_variable_creator_initial_value
    extended._get_variable_creator_initial_value = functools.partial(alone, extended)
    return strategy


def _cluster() -> _Cluster:
    if os.environ.get("TF_CONFIG"):
        return _from_tf_config(os.environ["TF_CONFIG"])
    started = world()
    if started and os.environ.get("DISTTRAIN_HOSTS"):
        return _resolved(_listed_workers(started), started.rank)
    if started and started.launcher == "torchrun" and "MASTER_ADDR" in os.environ:
        return _resolved(rendezvous.meet(started.rank, started.size), started.rank)
    if "SLURM_STEP_NODELIST" in os.environ:
        return _from_slurm()
    raise BackendError(
        "backend 'multiworker': neither TF_CONFIG nor a launcher says who the workers are. Set in each process "
        """TF_CONFIG='{"cluster": {"worker": ["host1:port", "host2:port"]}, "task": {"type": "worker", "index": 0}}'"""
    )


def _from_slurm() -> _Cluster:
    # TensorFlow's own resolver wants a GPU for every task, and sorts hosts by the alphabet, which Slurm does not.
    hosts = slurm_cluster_resolver.expand_hostlist(os.environ["SLURM_STEP_NODELIST"])
    tasks = slurm_cluster_resolver.expand_tasks_per_node(os.environ["SLURM_STEP_TASKS_PER_NODE"])
    places = [host for host, count in zip(hosts, tasks, strict=True) for _ in range(count)]
    # Other jobs, and other steps of this one, may be on the same nodes, and several nodes on one machine.
    step = int(os.environ["SLURM_JOB_ID"]) + 1009 * int(os.environ["SLURM_STEP_ID"])
    first = _SLURM_PORTS[step * _SLURM_PORTS_APART % len(_SLURM_PORTS)]
    workers = [f"{host}:{first + rank}" for rank, host in enumerate(places)]
    rank = sum(tasks[: int(os.environ["SLURM_NODEID"])]) + int(os.environ["SLURM_LOCALID"])
    return _resolved(workers, rank)


def _listed_workers(started: World) -> list[str]:
    """DISTTRAIN_HOSTS: host:port of every worker, in the order of ranks, the same text for all."""
    workers = [address.strip() for address in os.environ["DISTTRAIN_HOSTS"].split(",")]
    if len(workers) != started.size:
        raise BackendError(
            f"DISTTRAIN_HOSTS names {len(workers)} workers, but {started.launcher} started {started.size}"
        )
    odd = [address for address in workers if not address.rpartition(":")[2].isdigit()]
    if odd:
        raise BackendError(f"DISTTRAIN_HOSTS: {odd[0]!r} is not host:port")
    return workers


def _resolved(workers: list[str], rank: int) -> _Cluster:
    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
        tf.train.ClusterSpec({"worker": workers}),
        task_type="worker",
        task_id=rank,
        rpc_layer="grpc",
        num_accelerators={"GPU": int(bool(tf.config.list_physical_devices("GPU")))},
    )
    return _Cluster(workers, rank, resolver)


def _from_tf_config(text: str) -> _Cluster:
    try:
        config = json.loads(text)
        jobs, task = dict(config["cluster"]), config["task"]
        kind, index = task["type"], int(task["index"])
        if not all(isinstance(addresses, list) for addresses in jobs.values()):
            raise TypeError("the addresses of a job are a list")
    except (ValueError, LookupError, TypeError) as error:
        raise BackendError(
            f"TF_CONFIG is not what it should be ({type(error).__name__}: {error}): it wants JSON with "
            '"cluster": {"worker": ["host:port", ...]} and "task": {"type": "worker", "index": number}'
        ) from None
    others = sorted(set(jobs) - {"worker", "chief"})
    if others or kind not in jobs:
        raise BackendError(
            f"TF_CONFIG: jobs {', '.join(map(repr, jobs))} and this task {kind!r}; only 'worker' and 'chief' train here"
        )
    workers = [*jobs.get("chief", []), *jobs.get("worker", [])]
    twice = [address for address, count in collections.Counter(workers).items() if count > 1]
    if twice:
        raise BackendError(f"TF_CONFIG: address {twice[0]} is there twice; every worker needs its own port")
    if not 0 <= index < len(jobs[kind]):
        raise BackendError(f"TF_CONFIG: task index {index}, but there are {len(jobs[kind])} of {kind!r}")
    rank = index + (len(jobs.get("chief", [])) if kind == "worker" else 0)
    return _Cluster(workers, rank, tf.distribute.cluster_resolver.TFConfigClusterResolver())
