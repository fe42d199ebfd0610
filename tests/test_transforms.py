"""Each transform against its formula in numpy, on dense gradients and on IndexedSlices."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import copies, share

import disttrain as dt
from disttrain import transforms
from disttrain.errors import ConfigError

RNG = np.random.default_rng(0)
DENSE = RNG.normal(0, 2, (5, 3)).astype("float32")
BIAS = RNG.normal(0, 2, 3).astype("float32")
ROWS = RNG.normal(0, 2, (2, 3)).astype("float32")


def dense(gradient):
    """A gradient as a numpy array, IndexedSlices written out."""
    return None if gradient is None else tf.convert_to_tensor(gradient).numpy()


def gradients():
    """A matrix, a vector, two rows (4 and 1) of a table, and a variable without a gradient."""
    slices = tf.IndexedSlices(tf.constant(ROWS), tf.constant([4, 1]), tf.constant([6, 3]))
    return [tf.constant(DENSE), tf.constant(BIAS), slices, None]


def table():
    out = np.zeros((6, 3), "float32")
    out[[4, 1]] = ROWS
    return out


VALUES = [DENSE, BIAS, table()]
NORM = np.sqrt(sum(np.sum(v.astype("float64") ** 2) for v in VALUES))


@pytest.fixture(scope="module")
def variables():
    shapes = {"body/kernel": (5, 3), "body/bias": (3,), "table/rows": (6, 3), "head/kernel": (2,)}
    return [tf.Variable(np.zeros(shape, "float32"), name=name) for name, shape in shapes.items()]


def check(result, wanted, rtol=1e-6):
    assert result[3] is None
    for got, want in zip(result[:3], wanted, strict=True):
        np.testing.assert_allclose(dense(got), want, rtol=rtol, atol=1e-7)


@pytest.mark.parametrize("limit", [0.7, 100.0])
def test_clip_by_value(variables, limit):
    result = transforms.clip_by_value(limit)(gradients(), variables)
    check(result, [np.clip(v, -limit, limit) for v in VALUES])
    assert isinstance(result[2], tf.IndexedSlices)


@pytest.mark.parametrize("limit", [0.7, 5.0, 100.0])
def test_clip_by_norm(variables, limit):
    result = transforms.clip_by_norm(limit)(gradients(), variables)
    check(result, [v * min(1, limit / np.linalg.norm(v)) for v in VALUES])
    assert isinstance(result[2], tf.IndexedSlices)


@pytest.mark.parametrize("limit", [0.7, 100.0])
def test_clip_by_global_norm(variables, limit):
    result = transforms.clip_by_global_norm(limit)(gradients(), variables)
    check(result, [v * min(1, limit / NORM) for v in VALUES])
    clipped, _ = tf.clip_by_global_norm([tf.constant(v) for v in VALUES], limit)
    check(result, clipped)
    assert isinstance(result[2], tf.IndexedSlices)


@pytest.mark.parametrize("clip", [transforms.clip_by_value, transforms.clip_by_norm, transforms.clip_by_global_norm])
@pytest.mark.parametrize("limit", [0, -1.0, float("nan")])
def test_clip_limits_are_above_zero(clip, limit):
    with pytest.raises(ConfigError, match="the limit must be above zero"):
        clip(limit)


def test_clipping_of_zeros_is_zero(variables):
    zeros = [tf.zeros([5, 3])]
    for clip in (transforms.clip_by_norm(1.0), transforms.clip_by_global_norm(1.0)):
        np.testing.assert_array_equal(clip(zeros, variables[:1])[0], 0)


def test_scale_by_layer_takes_the_first_pattern_that_fits(variables):
    result = transforms.scale_by_layer({"body/bias": 3.0, "body/*": 0.5})(gradients(), variables)
    check(result, [0.5 * DENSE, 3 * BIAS, table()])
    check(transforms.scale_by_layer({"table/*": 0.0})(gradients(), variables), [DENSE, BIAS, 0 * table()])


def test_centralize(variables):
    result = transforms.centralize()(gradients(), variables)
    check(result, [DENSE - DENSE.mean(0), BIAS, table() - table().mean(0)])
    kernel = RNG.normal(0, 1, (3, 3, 2, 4)).astype("float32")
    (centered,) = transforms.centralize()([tf.constant(kernel)], [tf.Variable(kernel)])
    np.testing.assert_allclose(centered, kernel - kernel.mean((0, 1, 2)), atol=1e-6)


def test_cast(variables):
    result = transforms.cast("bfloat16")(gradients(), variables)
    assert [g.dtype for g in result[:3]] == [tf.bfloat16] * 3
    check([None if g is None else tf.cast(dense(g), tf.float32) for g in result], VALUES, rtol=2**-8)


def test_freeze_and_only(variables):
    assert [dense(g) is not None for g in transforms.freeze("body/*")(gradients(), variables)] == [0, 0, 1, 0]
    assert [dense(g) is not None for g in transforms.only("body/*")(gradients(), variables)] == [1, 1, 0, 0]
    assert [v.name for v in transforms.freeze("body/*", "head/*").select(variables)] == ["table/rows:0"]
    assert [v.name for v in transforms.only("*/kernel").select(variables)] == ["body/kernel:0", "head/kernel:0"]


def test_chain_goes_in_order(variables):
    clip, double = transforms.clip_by_value(1.0), transforms.scale_by_layer({"*": 2.0})
    check(transforms.chain(clip, double)(gradients(), variables), [2 * np.clip(v, -1, 1) for v in VALUES])
    check(transforms.chain(double, clip)(gradients(), variables), [np.clip(2 * v, -1, 1) for v in VALUES])
    check(transforms.chain()(gradients(), variables), VALUES)
    nested = transforms.chain(transforms.chain(clip), double)
    check(nested(gradients(), variables), [2 * np.clip(v, -1, 1) for v in VALUES])


def test_chain_refuses_what_cannot_be_called():
    with pytest.raises(ConfigError, match=r"1\.0 is no transform"):
        transforms.chain(1.0)


def test_monitor_sees_what_comes_to_its_place(variables):
    before, after = transforms.monitor(), transforms.monitor()
    both = transforms.chain(before, transforms.clip_by_norm(1.5), after)
    both.build(variables)
    check(both(gradients(), variables), [v * min(1, 1.5 / np.linalg.norm(v)) for v in VALUES])
    names = ["body/kernel", "body/bias", "table/rows", "head/kernel"]
    assert list(before.norms()) == names
    np.testing.assert_allclose(list(before.norms().values()), [*map(np.linalg.norm, VALUES), 0], rtol=1e-6)
    np.testing.assert_allclose(list(after.norms().values()), [1.5, 1.5, 1.5, 0], rtol=1e-6)


def test_add_noise_is_drawn_anew_for_each_variable_and_step(variables):
    noise = transforms.add_noise(0.1, seed=3)
    noise.build(variables)
    first, second = noise(gradients(), variables), noise(gradients(), variables)
    assert first[3] is None
    drawn = [dense(g) - v for result in (first, second) for g, v in zip(result[:3], VALUES, strict=True)]
    for i, a in enumerate(drawn):
        assert 0.005 < a.std() < 0.25
        for b in drawn[:i]:
            size = min(a.size, b.size)
            assert np.abs(a.ravel()[:size] - b.ravel()[:size]).max() > 1e-3
    again = transforms.add_noise(0.1, seed=3)
    again.build(variables)
    check(again(gradients(), variables), [dense(g) for g in first[:3]])


def test_add_noise_has_its_deviation_and_decays():
    big = [tf.Variable(tf.zeros([40_000]))]
    noise = transforms.add_noise(0.5, decay=1.0)
    noise.build(big)
    deviations = [np.std(noise([tf.zeros([40_000])], big)[0]) for _ in range(3)]
    np.testing.assert_allclose(deviations, [0.5, 0.25, 0.5 / 3], rtol=0.03)
    with pytest.raises(ConfigError, match="cannot be negative"):
        transforms.add_noise(-1.0)


def test_transforms_with_state_inside_a_step(three):
    """Noise and norms on replicas: the same on all, new at each step, and counted once for a step."""

    def build():
        return keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, kernel_initializer="ones")])

    def flat(model, batch):  # the gradient is zero: all that moves the weights is noise
        return 0.0 * tf.reduce_sum(model(batch[0]), -1)

    with three.scope():
        model, optimizer = build(), keras.optimizers.SGD(1.0)
    monitor, noise = transforms.monitor(), transforms.add_noise(0.5)
    step = dt.TrainStep(
        model,
        optimizer,
        loss_fn=flat,
        comm=three,
        after_reduce=[noise, transforms.clip_by_value(1e6), monitor],
        jit=False,
    )
    x = np.ones((5, 3), "float32")
    steps = []
    for _ in range(2):
        before = copies(model.trainable_variables[0])[0]
        step(share(three, (x,), [3, 0, 2]))
        values = copies(model.trainable_variables[0])
        assert values[0].tobytes() == values[1].tobytes() == values[2].tobytes()
        steps.append(before - values[0])
        norms = monitor.norms()
        assert list(norms) == [v.path for v in model.trainable_variables]
        np.testing.assert_allclose(norms[model.trainable_variables[0].path], np.linalg.norm(steps[-1]), rtol=1e-4)
    assert np.abs(steps[0]).max() > 0.1
    assert np.abs(steps[0] - steps[1]).max() > 0.1
    assert copies(noise._count) == [2, 2, 2]


def test_before_reduce_sees_each_replicas_own_mean(two):
    """Clipping there gives the weighted mean of clipped means."""
    with two.scope():
        model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")])
        optimizer = keras.optimizers.SGD(1.0)
    x = np.ones((4, 1), "float32")
    labels = np.array([[1], [1], [1], [-4]], "float32")  # gradients -2, -2, -2, 8
    clip = transforms.clip_by_value(3.0)
    loss_fn = dt.losses.mean_squared_error()
    step = dt.TrainStep(model, optimizer, loss_fn=loss_fn, comm=two, before_reduce=[clip], jit=False)
    out = step(share(two, (x, labels), [3, 1]))
    np.testing.assert_allclose(model.get_weights()[0], [[-(3 * -2 + 3) / 4]], rtol=1e-6)
    np.testing.assert_allclose(out.grad_norm, 0.75, rtol=1e-6)


def test_bfloat16_on_the_wire(three):
    """`cast` among `before_reduce` rounds, and the step still applies float32."""
    with three.scope():
        model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, kernel_initializer="zeros")])
        optimizer = keras.optimizers.SGD(1.0)
    loss_fn = dt.losses.mean_squared_error()
    step = dt.TrainStep(
        model, optimizer, loss_fn=loss_fn, comm=three, before_reduce=[transforms.cast("bfloat16")], jit=False
    )
    x = np.random.default_rng(0).uniform(0.5, 1, (9, 2)).astype("float32")
    step(share(three, (x, np.ones((9, 1), "float32")), [2, 3, 4]))
    wanted = 2 * x.mean(0)
    got = model.get_weights()[0][:, 0]
    np.testing.assert_allclose(got, wanted, rtol=2**-7)
    assert np.abs(got - wanted).max() > 1e-5
