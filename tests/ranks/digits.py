"""Trains on digits, as one rank or several: python digits.py BACKEND FILE. Rank 0 leaves the weights, before and after."""

import sys

import keras
import numpy as np
import tensorflow as tf

import disttrain as dt
from disttrain.data import digits

comm = dt.init(sys.argv[1])
keras.utils.set_random_seed(7)
seen, _ = digits.load()
with comm.scope():
    model = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Flatten(), keras.layers.Dense(10)])
    optimizer = keras.optimizers.SGD(0.5, momentum=0.9)
loss = dt.losses.sparse_categorical_crossentropy()
step = dt.TrainStep(model, optimizer, loss_fn=loss, comm=comm, accumulate=2, jit=False)
weights = lambda: np.concatenate([v.numpy().ravel() for v in model.trainable_variables])  # noqa: E731
before = weights()
dt.Trainer(step).fit(tf.data.Dataset.from_tensor_slices(tuple(seen)).batch(200), epochs=2)
if comm.is_chief:
    np.savez(sys.argv[2], before=before, after=weights())
comm.close()
