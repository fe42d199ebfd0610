"""Trains a deep model over MPI, and notes when its buckets travel and how many buffers they need."""

import time

import keras
import tensorflow as tf
from _report import BACKEND, report  # first: it writes down the process's id

import disttrain as dt

STEPS, WIDTH, LAYERS = 8, 512, 10
events = []


def noting(name, fn):
    """The same function; when it was done is noted."""

    def noted(*args):
        result = fn(*args)
        events.append((name, time.perf_counter()))
        return result

    return noted


@tf.custom_gradient
def note_backward(x):
    """Changes nothing; notes when the backward pass comes here."""

    def backward(gradient):
        noted = tf.numpy_function(noting("backward", lambda x: x), [gradient], gradient.dtype, stateful=False)
        noted.set_shape(gradient.shape)
        return noted

    return tf.identity(x), backward


def loss_fn(model, x):
    x = note_backward(model.layers[0](x))
    for layer in model.layers[1:]:
        x = layer(x)
    return tf.reduce_mean(tf.square(x - 1), axis=1)


def first(name):
    return next(when for event, when in events if event == name)


comm = dt.init(BACKEND, bucket_mib=1.5)  # one layer in each
comm._begin, comm._reduce = noting("begun", comm._begin), noting("reduced", comm._reduce)
model = keras.Sequential([keras.Input((WIDTH,)), *(keras.layers.Dense(WIDTH, "tanh") for _ in range(LAYERS))])
step = dt.TrainStep(model, keras.optimizers.SGD(0.01), loss_fn=loss_fn, comm=comm, jit=False)
x = tf.random.stateless_uniform([512, WIDTH], seed=[0, comm.rank])
begun, reduced, buffers = [], [], []
for _ in range(STEPS):
    events.clear()
    out = step(x)
    begun.append(first("begun") < first("backward"))
    reduced.append(first("reduced") < first("backward"))
    buffers.append(sum(map(len, comm._pool._flats.values())))
report(
    begun=begun,
    reduced=reduced,
    buffers=buffers,
    buckets=sum(name == "begun" for name, _ in events),
)
comm.close()
