"""What of the machine a process takes when several share it."""

from __future__ import annotations

import contextlib
import os

import tensorflow as tf

from disttrain.errors import BackendError


def claim(local_rank: int, local_size: int) -> None:
    """One GPU for this process, growing as needed, and its part of the cores. Before anything else uses TensorFlow.

    Raises:
      BackendError: there are GPUs, but fewer than processes on this machine.
    """
    gpus = tf.config.list_physical_devices("GPU")
    # A launcher may show each process its own GPU only. Where there are too few, all ranks here say so: one that ended
    # alone would leave the others waiting.
    if 1 < len(gpus) < local_size:
        raise BackendError(
            f"{local_size} ranks on this machine, but {len(gpus)} GPUs: start {len(gpus)} ranks here, "
            "or set CUDA_VISIBLE_DEVICES= (empty) to train on CPUs"
        )
    # TensorFlow refuses both once it has started; then the user has chosen.
    with contextlib.suppress(RuntimeError):
        if gpus:
            mine = gpus[local_rank] if len(gpus) > 1 else gpus[0]
            tf.config.set_visible_devices(mine, "GPU")
            tf.config.experimental.set_memory_growth(mine, True)
    _share_cores(local_size)


def yield_while_waiting() -> None:
    """Ranks that wait in Open MPI give their core away; with more ranks than cores nothing moves otherwise."""
    os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")


def _share_cores(local_size: int) -> None:
    """Threads for this process's part of the cores, where nobody else has set them.

    TensorFlow's default is a thread for every core in each process, so that N ranks on a machine have N times too many.
    """
    cores = len(os.sched_getaffinity(0))
    # A launcher that binds has already given each process its own part.
    bound = cores < (os.cpu_count() or cores)
    threads = cores if bound else max(1, cores // local_size)
    with contextlib.suppress(RuntimeError):
        if tf.config.threading.get_intra_op_parallelism_threads() == 0 and "TF_NUM_INTRAOP_THREADS" not in os.environ:
            tf.config.threading.set_intra_op_parallelism_threads(threads)
        if tf.config.threading.get_inter_op_parallelism_threads() == 0 and "TF_NUM_INTEROP_THREADS" not in os.environ:
            tf.config.threading.set_inter_op_parallelism_threads(max(2, threads))
