"""Ranks and tensors: one file for each backend, the same functions in each."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import logging
import os
import platform

import keras
import tensorflow as tf

from disttrain.comm.buckets import Wire
from disttrain.comm.communicator import Communicator
from disttrain.comm.local import LocalCommunicator
from disttrain.comm.mirrored import MirroredCommunicator
from disttrain.errors import BackendError, ConfigError
from disttrain.world import WORLD_SIZE, world

__all__ = ["Communicator", "init"]

BACKENDS = ("auto", "local", "mirrored", "multiworker", "horovod", "mpi")


def init(
    backend: str = "auto",
    *,
    replicas: int | None = None,
    bucket_mib: float = 25,
    wire_dtype: str | None = None,
    stall_timeout: float = 120,
) -> Communicator:
    """Joins the group of replicas that train together. Call it before anything else uses TensorFlow.

    Args:
      backend: "local" (one device), "mirrored" (the devices of this machine), "horovod" or "mpi" (processes started by
        horovodrun, mpirun or srun), "multiworker" (processes that `TF_CONFIG`, Slurm, torchrun's variables or DISTTRAIN_HOSTS
        describe), or "auto": where a launcher started several processes and connects them, horovod if it is built, else mpi;
        where several were started otherwise, multiworker; where there are several GPUs or `replicas` asks for several,
        mirrored; else local.
      replicas: number of replicas, for "mirrored" and "auto". GPUs where there are any, else logical CPU devices.
      bucket_mib: MiB of gradients that travel together between processes.
      wire_dtype: "float16" or "bfloat16" halves the traffic of large float32 tensors between processes; they are scaled
        so that no sum overflows. None: as they are.
      stall_timeout: seconds after which a process that has stopped, or that the others wait for in vain, ends them all
        with an error that names it. Between processes only.

    Raises:
      BackendError: the backend is unknown or cannot start here, Keras does not run on TensorFlow, a launcher started
        several processes, which this backend would train as so many unrelated models, or the ranks differ in their
        versions or in these options.
      ConfigError: `replicas` does not fit the backend, or an option is out of range.
    """
    if keras.backend.backend() != "tensorflow":
        raise BackendError(f"Keras runs on {keras.backend.backend()}, not TensorFlow: set KERAS_BACKEND=tensorflow")
    if backend not in BACKENDS:
        raise BackendError(
            f"unknown backend {backend!r}: use {', '.join(map(repr, BACKENDS[:-1]))} or {BACKENDS[-1]!r}"
        )
    if replicas is not None and (not isinstance(replicas, int) or replicas < 1):
        raise ConfigError(f"replicas={replicas!r}: a whole number of 1 or more is wanted")
    if not stall_timeout > 0:
        raise ConfigError(f"stall_timeout={stall_timeout!r}: seconds above zero are wanted")
    wire = Wire(bucket_mib, wire_dtype)
    if backend == "auto":
        backend = _choose(replicas)
    if backend == "mirrored":
        return MirroredCommunicator(replicas)
    if backend == "local":
        _refuse_replicas(backend, replicas, "use backend 'mirrored'")
        return LocalCommunicator()
    _refuse_replicas(backend, replicas, "leave it out, the launcher says how many processes there are")
    comm = _processes(backend, wire, stall_timeout)
    _check_world(comm)
    options = {"bucket_mib": bucket_mib, "wire_dtype": wire_dtype, "stall_timeout": stall_timeout}
    meet = functools.partial(_meet, comm, options, logging.getLogger("disttrain").level)
    meet()
    if comm.elastic:
        comm.on_regroup = meet
    return comm


def _choose(replicas: int | None) -> str:
    started = world()
    if started and started.size > 1 and started.collectives:
        return "horovod" if importlib.util.find_spec("horovod") else "mpi"
    if os.environ.get("TF_CONFIG") or (started and started.size > 1):
        return "multiworker"
    several = replicas > 1 if replicas else len(tf.config.list_physical_devices("GPU")) > 1
    return "mirrored" if several else "local"


def _processes(backend: str, wire: Wire, stall_timeout: float) -> Communicator:
    # Imported here: each needs what the others do not.
    if backend == "horovod":
        from disttrain.comm.horovod import HorovodCommunicator

        return HorovodCommunicator(wire, stall_timeout)
    if backend == "mpi":
        from disttrain.comm.mpi import MpiCommunicator

        return MpiCommunicator(wire, stall_timeout)
    from disttrain.comm.multiworker import MultiWorkerCommunicator

    return MultiWorkerCommunicator(wire, stall_timeout)


def _meet(comm: Communicator, options: dict, log_level: int) -> None:
    """What ranks do first when they have come together; in an elastic job again whenever they do."""
    # Rank 0 speaks; the others only when something is wrong.
    logging.getLogger("disttrain").setLevel(log_level if comm.is_chief else max(log_level, logging.WARNING))
    _agree(comm, options)


def _check_world(comm: Communicator) -> None:
    """A launcher of one MPI and a library of another leave each process alone in a world of its own."""
    started = world()
    if started and comm.size == 1 < started.size and not os.environ.get("TF_CONFIG"):
        raise BackendError(
            f"{started.launcher} started {started.size} processes, but backend {comm.name!r} sees one. The launcher must be that "
            "of the same MPI library (for Open MPI from PyPI, the mpirun beside this Python)"
        )
    asked = os.environ.get(WORLD_SIZE)
    if asked and comm.size != int(asked):
        raise BackendError(f"`disttrain run` started {asked} ranks, but backend {comm.name!r} sees {comm.size}")


def _refuse_replicas(backend: str, replicas: int | None, mend: str) -> None:
    if replicas not in (None, 1):
        raise ConfigError(f"backend {backend!r} has one replica a process, {replicas} asked for: {mend}")


def _agree(comm: Communicator, options: dict) -> None:
    """Every rank raises, naming the odd ones, where ranks differ in what they run."""
    mine = {name: importlib.metadata.version(name) for name in ("disttrain", "tensorflow", "keras")}
    mine |= {"Python": platform.python_version(), "backend": comm.name, **options}
    by_rank = comm.all_gather_object(mine)
    for name in mine:
        said = [theirs.get(name) for theirs in by_rank]
        odd = [rank for rank, value in enumerate(said) if value != said[0]]
        if odd:
            raise BackendError(
                f"ranks disagree on {name}: {said[0]} on rank 0, {said[odd[0]]} on rank {odd[0]}: make them equal"
            )
