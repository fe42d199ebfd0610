"""Trains four times: rank 1 slow in its input; slow in its computing; no rank slow; ranks with more or fewer batches."""

import logging.handlers
import time

import keras
import tensorflow as tf
from _report import BACKEND, RANK, report  # first: it writes down the process's id

import disttrain as dt

# Long against what a loaded machine adds to them.
USUAL, MORE = 0.1, 0.15


def batches(count, seconds=0.0):
    for _ in range(count):
        time.sleep(seconds)
        yield tf.ones([4, 3]), tf.ones([4, 1])


def train(data, computing=USUAL):
    """What the logger was told, and what `fit` says."""

    def computed(x):
        time.sleep(computing)
        return x

    def loss_fn(model, batch, training=True):
        x, y = batch
        x = tf.ensure_shape(tf.numpy_function(computed, [x], x.dtype), [None, 3])
        return tf.reduce_sum(tf.square(model(x) - y), axis=-1)

    with comm.scope():
        model, optimizer = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)]), keras.optimizers.SGD(0.01)
    step = dt.TrainStep(model, optimizer, loss_fn=loss_fn, comm=comm, jit=False)
    warnings.buffer.clear()
    summary = dt.Trainer(step, progress=False).fit(data, epochs=1)
    return {"said": [record.getMessage() for record in warnings.buffer], **summary}


comm = dt.init(BACKEND)
warnings = logging.handlers.BufferingHandler(1000)
logging.getLogger("disttrain").addHandler(warnings)
more = MORE if RANK == 1 else 0.0
report(
    input=train(batches(21, more)),
    computing=train(batches(21), USUAL + more),
    nothing=train(batches(35)),
    uneven=train(batches(8 + 4 * RANK), 0.0),
)
comm.close()
