"""Trains with one slow rank. Arguments: what it is slow in ("input", "computing" or "nothing"), the rank, steps."""

import logging.handlers
import sys
import time

import keras
import tensorflow as tf
from _report import BACKEND, RANK, report  # first: it writes down the process's id

import disttrain as dt

SLOW_IN, SLOW_RANK, STEPS = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
# Long against what a loaded machine adds to them.
USUAL, MORE = 0.1, 0.15


def seconds(part: str, usual: float = 0.0) -> float:
    return usual + MORE * (RANK == SLOW_RANK and part == SLOW_IN)


def batches():
    for _ in range(STEPS):
        time.sleep(seconds("input"))
        yield tf.ones([4, 3]), tf.ones([4, 1])


def computed(x):
    time.sleep(seconds("computing", USUAL))
    return x


def loss_fn(model, batch, training=True):
    x, y = batch
    x = tf.ensure_shape(tf.numpy_function(computed, [x], x.dtype), [None, 3])
    return tf.reduce_sum(tf.square(model(x) - y), axis=-1)


comm = dt.init(BACKEND)
warnings = logging.handlers.BufferingHandler(1000)
logging.getLogger("disttrain").addHandler(warnings)
with comm.scope():
    model, optimizer = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)]), keras.optimizers.SGD(0.01)
step = dt.TrainStep(model, optimizer, loss_fn=loss_fn, comm=comm, jit=False)
summary = dt.Trainer(step, progress=False).fit(batches(), steps=STEPS)
said = [record.getMessage() for record in warnings.buffer]
report(said=said, ranks=summary["ranks"], input_share=summary["input_share"])
comm.close()
