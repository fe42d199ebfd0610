"""However a batch is divided over replicas and micro-batches, and whatever its sample weights: the same update."""

import functools

import keras
import numpy as np
import reference
import tensorflow as tf
from helpers import assert_replicas_equal, relative_error, share, weights
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import disttrain as dt


def build():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4, "sigmoid"), keras.layers.Dense(1)])
    rng = np.random.default_rng(5)
    model.set_weights([rng.uniform(0.05, 0.3, v.shape).astype("float32") for v in model.trainable_variables])
    return model


FIRST = weights(build())


@functools.cache
def step_of(comm, accumulate):
    with comm.scope():
        model, optimizer = build(), keras.optimizers.SGD(0.05)
    loss_fn = dt.losses.mean_squared_error()
    return dt.TrainStep(model, optimizer, loss_fn=loss_fn, comm=comm, accumulate=accumulate, jit=False)


@st.composite
def divided_batches(draw):
    sizes = draw(st.lists(st.integers(0, 8), min_size=3, max_size=3).filter(any))
    weight = st.sampled_from([0.0, 0.01, 0.5, 1.0, 3.0, 40.0])
    sample_weight = draw(st.lists(weight, min_size=sum(sizes), max_size=sum(sizes)).filter(any))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    x = rng.uniform(0.1, 1, (sum(sizes), 3)).astype("float32")
    return sizes, (x, 20 + 5 * x.mean(1, keepdims=True), np.array(sample_weight, "float32"))


def mean_loss(model, batch):
    x, y, w = batch
    return tf.reduce_sum(tf.square(model(x) - y)[:, 0] * w) / tf.reduce_sum(w)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=divided_batches(), accumulate=st.integers(1, 6))
def test_any_split_gives_the_update_of_one_device(three, case, accumulate):
    sizes, batch = case
    step = step_of(three, accumulate)
    step.model.set_weights(FIRST)
    out = step(share(three, batch, sizes))
    _, wanted = reference.train(build(), keras.optimizers.SGD(0.05), mean_loss, [batch])
    assert relative_error(weights(step.model), FIRST, wanted) <= 1e-6
    assert_replicas_equal(three, step.model.variables)
    np.testing.assert_allclose(out.weight, batch[2].sum(dtype="float64"), rtol=1e-6)
