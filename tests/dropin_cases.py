"""What the ranks of the tests of Horovod-style optimizers train, and the single device that they are compared with."""

import keras
import numpy as np
import tensorflow as tf

BATCH, STEPS = 16, 4
_rng = np.random.default_rng(7)
INPUTS = _rng.normal(size=(BATCH * STEPS, 6)).astype(np.float32)
WORDS = _rng.integers(0, 10, size=(BATCH * STEPS, 4)).astype(np.int32)
TARGETS = _rng.normal(size=(BATCH * STEPS, 3)).astype(np.float32)


def dense():
    """A small model for INPUTS, always with the same weights."""
    keras.utils.set_random_seed(3)
    layers = [keras.layers.Dense(8, activation="tanh"), keras.layers.Dense(3)]
    return keras.Sequential([keras.Input((6,)), *layers])


def embedding():
    """A small model for WORDS, whose first gradient is IndexedSlices with rows that occur more than once."""
    keras.utils.set_random_seed(3)
    layers = [keras.layers.Embedding(10, 5), keras.layers.Flatten(), keras.layers.Dense(3)]
    return keras.Sequential([keras.Input((4,), dtype="int32"), *layers])


def normalized(layer):
    """A small model for INPUTS with a normalization of class `layer`."""
    keras.utils.set_random_seed(3)
    hidden = keras.layers.Dense(8, use_bias=False)
    return keras.Sequential([keras.Input((6,)), hidden, layer(), keras.layers.Dense(3)])


def _schedule():
    return keras.optimizers.schedules.ExponentialDecay(0.1, 1, 0.5)


# name -> (model, its inputs, optimizer of the ranks, optimizer of one device, backward passes per step)
CASES = {
    "momentum, global_clipnorm": (
        dense,
        INPUTS,
        lambda: keras.optimizers.SGD(0.1, momentum=0.9, global_clipnorm=0.1),
        lambda: keras.optimizers.SGD(0.1, momentum=0.9, global_clipnorm=0.1),
        1,
    ),
    "adam, clipvalue": (
        dense,
        INPUTS,
        lambda: keras.optimizers.Adam(0.01, clipvalue=0.01),
        lambda: keras.optimizers.Adam(0.01, clipvalue=0.01),
        1,
    ),
    "two passes, schedule, IndexedSlices": (
        embedding,
        WORDS,
        lambda: keras.optimizers.SGD(_schedule(), momentum=0.9, global_clipnorm=0.1),
        lambda: keras.optimizers.SGD(_schedule(), momentum=0.9, global_clipnorm=0.1),
        2,
    ),
    "loss scale, IndexedSlices": (
        embedding,
        WORDS,
        lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.01), initial_scale=1024.0),
        lambda: keras.optimizers.Adam(0.01),
        1,
    ),
}


def share(array, rank, size):
    """This rank's part of every batch, in order."""
    batches = array.reshape(STEPS, size, BATCH // size, *array.shape[1:])
    return batches[:, rank].reshape(-1, *array.shape[1:])


def one_device(model, optimizer, inputs, passes=1):
    """Plain Keras, each step on the whole of `passes` batches. Yields the weights before and after every step."""
    yield model.get_weights()
    for begin in range(0, len(inputs), BATCH * passes):
        rows = slice(begin, begin + BATCH * passes)
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(inputs[rows], training=True) - TARGETS[rows]))
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply([tf.convert_to_tensor(g) for g in gradients], model.trainable_variables)
        yield model.get_weights()
