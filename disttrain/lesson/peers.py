"""How the peers train: as their users would write it."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from disttrain.lesson.case import Case, build_model, weights_of

HOROVOD_SECONDS = 60


class NotInstalledError(Exception):
    """The peer, or what it is started with, is not installed here."""


def fit_on_two(case: Case) -> np.ndarray:
    """`compile` and `fit` under MirroredStrategy."""
    return _fit(case, _two_replicas().scope())


def fit_on_one(case: Case) -> np.ndarray:
    """`compile` and `fit` without a strategy."""
    return _fit(case, contextlib.nullcontext())


def _fit(case: Case, scope: contextlib.AbstractContextManager) -> np.ndarray:
    options = {case.clip: case.limit} if case.clip else {}
    if case.accumulate > 1:
        options["gradient_accumulation_steps"] = case.accumulate
    # Keras's default divides by the number of examples; this reduction is its own way to the weighted mean.
    reduction = "mean_with_sample_weight" if case.weights else "sum_over_batch_size"
    with scope:
        model = build_model()
        optimizer = keras.optimizers.SGD(case.learning_rate, **options)
        model.compile(optimizer, loss=keras.losses.MeanSquaredError(reduction))
    before = weights_of(model)
    columns = tuple(np.concatenate(column) for column in zip(*case.batches(), strict=True))
    model.fit(tf.data.Dataset.from_tensor_slices(columns).batch(case.fit_batch), verbose=0)
    return weights_of(model) - before


def minimize(optimizer: keras.optimizers.Optimizer, loss: Callable[[], tf.Tensor], variables: list) -> None:
    """What `minimize` did until Keras 3, and what people write in its place: the gradient is nowhere to be seen."""
    with tf.GradientTape() as tape:
        value = loss()
    optimizer.apply_gradients(zip(tape.gradient(value, variables), variables, strict=True))


def reduce_then_apply(optimizer: keras.optimizers.Optimizer, loss: Callable[[], tf.Tensor], variables: list) -> None:
    """The same by someone who knows that gradients have to be averaged, and does it."""
    with tf.GradientTape() as tape:
        value = loss()
    gradients = tf.distribute.get_replica_context().all_reduce("MEAN", tape.gradient(value, variables))
    optimizer.apply_gradients(zip(gradients, variables, strict=True))


def minimize_on_two(case: Case) -> np.ndarray:
    """A loop of one's own with `minimize` in every replica."""
    return _own_loop(case, minimize)


def reduce_then_apply_on_two(case: Case) -> np.ndarray:
    """A loop of one's own with an all-reduce of one's own in every replica."""
    return _own_loop(case, reduce_then_apply)


def _own_loop(case: Case, update: Callable) -> np.ndarray:
    strategy = _two_replicas()
    with strategy.scope():
        model, optimizer = build_model(), keras.optimizers.SGD(case.learning_rate)
        optimizer.build(model.trainable_variables)
    before = weights_of(model)

    def replica_step(batch):
        inputs, labels = batch
        update(optimizer, lambda: tf.reduce_mean(tf.square(model(inputs) - labels)), model.trainable_variables)

    train = tf.function(lambda batch: strategy.run(replica_step, (batch,)))
    (batch,) = case.batches()
    for share in strategy.experimental_distribute_dataset(tf.data.Dataset.from_tensors(batch)):
        train(share)
    return weights_of(model) - before


def _two_replicas() -> tf.distribute.MirroredStrategy:
    """A new one for each case, so that one that fails leaves nothing behind for the next."""
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


def horovod_on_two(case: Case) -> np.ndarray:
    """The updates of both ranks of `horovod_rank.py`, which `mpirun` starts: [2, weights]."""
    if importlib.util.find_spec("horovod") is None:
        raise NotInstalledError("Horovod is not installed here, so it was not run.")
    mpirun = shutil.which("mpirun") or shutil.which("mpirun", path=str(Path(sys.executable).parent))
    if mpirun is None:
        raise NotInstalledError(
            "Horovod is installed, but there is no mpirun to start two ranks with, so it was not run."
        )
    with tempfile.TemporaryDirectory() as folder:
        command = [mpirun, "--oversubscribe", "--bind-to", "none", "-np", "2"]
        command += [sys.executable, "-m", "disttrain.lesson.horovod_rank", case.key, folder]
        # Open MPI refuses root unless told twice, and many containers have no other user.
        as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        done = subprocess.run(
            command, env=os.environ | as_root, timeout=HOROVOD_SECONDS, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"mpirun ended with {done.returncode}: {_last_error(done.stderr)}")
        return np.stack([np.load(Path(folder, f"{rank}.npy")) for rank in range(2)])


def _last_error(stderr: str) -> str:
    """The line in which Python names the exception; what Open MPI adds below it says less."""
    lines = [line for line in stderr.splitlines() if line.strip()] or ["nothing on stderr"]
    return next((line for line in reversed(lines) if re.match(r"[\w.]+(Error|Exception)\b", line)), lines[-1])
