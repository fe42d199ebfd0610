"""What each rank of `disttrain build-horovod`'s check runs: one all-reduce, whose result is known. Run by its path."""

from __future__ import annotations

import sys


def main() -> None:
    """Exits with a sentence where a sum over ranks is not what it has to be."""
    import horovod.tensorflow as hvd
    import tensorflow as tf

    hvd.init()
    gpus = tf.config.list_physical_devices("GPU")
    # NCCL refuses two ranks on one GPU, and TensorFlow takes all of its memory for one of them.
    on_gpu = bool(hvd.nccl_built()) and len(gpus) >= hvd.local_size()
    tf.config.set_visible_devices([gpus[hvd.local_rank()]] if on_gpu else [], "GPU")
    for device in ["CPU:0", *(["GPU:0"] if on_gpu else [])]:
        _check_sum(hvd, tf, device)
    if not (hvd.mpi_built() and hvd.gloo_built()):
        sys.exit("error: Horovod was built without MPI or without Gloo")
    if "--gpu" in sys.argv and not hvd.nccl_built():
        sys.exit("error: Horovod was built without NCCL")


def _check_sum(hvd, tf, device: str) -> None:
    with tf.device(device):
        mine = tf.range(1000.0) * (hvd.rank() + 1)
        total = hvd.allreduce(mine, op=hvd.Sum)
    expected = tf.range(1000.0) * (hvd.size() * (hvd.size() + 1) / 2)
    if hvd.size() != 2 or not bool(tf.reduce_all(total == expected)):
        sys.exit(f"error: the sum over {hvd.size()} ranks is wrong on {device}, or they are not two")


if __name__ == "__main__":
    main()
