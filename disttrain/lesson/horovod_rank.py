"""One rank of Horovod's case: half of the batch, and the optimizer that Horovod has wrapped.

Started by `disttrain why`: mpirun -np 2 python -m disttrain.lesson.horovod_rank CASE FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import horovod.tensorflow as hvd
import keras
import numpy as np
import tensorflow as tf

from disttrain.lesson.case import Case, build_model, weights_of
from disttrain.lesson.cases import CASES


def rank_update(case: Case) -> np.ndarray:
    """What this rank's weights have moved by."""
    model = build_model()
    before = weights_of(model)
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(case.learning_rate))
    (batch,) = case.batches()
    inputs, labels = (np.array_split(column, hvd.size())[hvd.rank()] for column in batch)
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(tf.square(model(inputs) - labels))
    variables = model.trainable_variables
    optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
    return weights_of(model) - before


def main(key: str, folder: str) -> None:
    """Trains, and leaves the update in FOLDER/RANK.npy."""
    hvd.init()
    case = next(case for case in CASES if case.key == key)
    np.save(Path(folder, f"{hvd.rank()}.npy"), rank_update(case))
    hvd.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
