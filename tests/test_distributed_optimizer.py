"""`dt.DistributedOptimizer` and `dt.callbacks`: two real processes against one device, and what they refuse."""

import functools
import json
import subprocess
import sys

import dropin_cases as cases
import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import relative_error
from once import once

import disttrain as dt
from disttrain.callbacks import weighted_means
from launch import launch

LIMIT = 1e-6


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What two ranks of `ranks/dropin_optimizer.py` have to say."""
    # Ranks that wait leave the core to others: there may be more processes than cores.
    env = {"OMPI_MCA_mpi_yield_when_idle": "1"}
    job = functools.partial(launch, "horovod", 2, "dropin_optimizer", timeout=240, env=env)
    return once(tmp_path_factory, "dropin_optimizer", lambda: job().check())


def weights_of(result, name, rank=0):
    arrays = result.arrays[rank]
    return [arrays[f"{name}/{i}"] for i in range(sum(key.startswith(f"{name}/") for key in arrays))]


@pytest.mark.parametrize("name", cases.CASES)
def test_fit_on_two_ranks_is_one_device_on_the_joined_batch(ranks, name):
    make_model, inputs, _, make_optimizer, passes = cases.CASES[name]
    optimizer = make_optimizer()
    before, *_, after = cases.one_device(make_model(), optimizer, inputs, passes)
    assert relative_error(weights_of(ranks, name), before, after) <= LIMIT
    assert ranks.reports[0][f"iterations of {name}"] == int(optimizer.iterations) == cases.STEPS // passes


@pytest.mark.parametrize("name", ["eager", "function"])
def test_loops_of_ones_own(ranks, name):
    make_model, inputs, _, make_optimizer, _ = cases.CASES["adam, clipvalue"]
    before, *_, after = cases.one_device(make_model(), make_optimizer(), inputs)
    assert relative_error(weights_of(ranks, name), before, after) <= LIMIT


def test_ranks_end_with_the_same_bits(ranks):
    first, second = ranks.arrays
    assert first.keys() == second.keys()
    assert [k for k in first if first[k].tobytes() != second[k].tobytes()] == []


def test_none_on_one_rank_is_zero_and_none_on_all_is_left_alone(ranks):
    # Momentum 0.5 and mean gradient 1: -1, then -1.5. Mean gradient 1/2 of `b`; of `d` two rows of 1 on one of two ranks.
    wanted = [[-1.5, -0.5], [-0.25, 0.75], [1.0, 2.0], [[1.0, 1.0], [-1.5, -1.5], [1.0, 1.0], [1.0, 1.0]]]
    assert [report["none"] for report in ranks.reports] == [wanted, wanted]


def test_ranks_with_other_shapes_are_told(ranks):
    for report in ranks.reports:
        assert "(3,) on rank 1" in report["differ"]
        assert "(2,) on rank 0" in report["differ"]


def test_adasum(ranks):
    assert [report["adasum"] for report in ranks.reports] == [[[-1.0, 0.0], [-1.0, -1.0]]] * 2


def test_nan_on_one_rank_halves_the_scale_of_all(ranks):
    scales = [report["float16"] for report in ranks.reports]
    assert scales == [[2.0**14, cases.STEPS - 1]] * 2
    assert all(np.isfinite(w).all() for w in weights_of(ranks, "float16"))


def test_callbacks_in_fit(ranks):
    for report in ranks.reports:
        said = report["callbacks"]
        assert said["started apart"]
        np.testing.assert_allclose(said["losses"], said["wanted"], rtol=1e-6)
        # From 1/2 to 1 over two epochs.
        np.testing.assert_allclose(said["rates"], [0.0075, 0.01], rtol=1e-6)


def test_a_saved_model_loads_without_disttrain(ranks, tmp_path):
    script = """
import json, sys, keras
said = {}
for name in sys.argv[1:]:
    optimizer = keras.saving.load_model(name).optimizer
    said[name[-2:]] = [type(optimizer) is keras.optimizers.Adam, int(optimizer.iterations), len(optimizer.variables)]
print(json.dumps([said, "disttrain" in sys.modules]))
"""
    paths = []
    for name, content in ranks.reports[0]["saved"].items():
        paths.append(tmp_path / name)
        paths[-1].write_bytes(bytes.fromhex(content))
    command = [sys.executable, "-c", script, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    # Iteration, learning rate, and two moments of four weights; the last are lost in Keras's h5 format.
    wanted = {"as": [True, cases.STEPS, 10], "h5": [True, cases.STEPS, 2]}
    assert json.loads(done.stdout.splitlines()[-1]) == [wanted, False]


# In this process --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["fit", "loop"])
@pytest.mark.parametrize("name", ["momentum, global_clipnorm", "loss scale, IndexedSlices"])
def test_mirrored_replicas(two, name, how):
    make_model, inputs, make_optimizer, make_reference, _ = cases.CASES[name]
    before, *_, after = cases.one_device(make_model(), make_reference(), inputs)
    with two.scope():
        model, optimizer = make_model(), dt.DistributedOptimizer(make_optimizer(), two)
        optimizer.build(model.trainable_variables)
        model.compile(optimizer, loss="mse")
    if how == "fit":
        model.fit(inputs, cases.TARGETS, batch_size=cases.BATCH, shuffle=False, verbose=0)
    else:
        with two.scope():
            optimizer = dt.DistributedOptimizer(make_optimizer(), two)
            optimizer.build(model.trainable_variables)

        def step(x, y):
            with tf.GradientTape() as tape:
                loss = optimizer.scale_loss(tf.reduce_mean(tf.square(model(x) - y)))
            optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)

        run = tf.function(lambda *batch: two.run(step, batch))
        for batch in two.distribute(tf.data.Dataset.from_tensor_slices((inputs, cases.TARGETS)).batch(cases.BATCH)):
            run(*batch)
    assert relative_error(model.get_weights(), before, after) <= LIMIT


def test_it_stays_the_optimizer_that_it_is(local):
    plain = keras.optimizers.Adam(0.01, clipnorm=1.0)
    serialized = keras.optimizers.serialize(plain)
    optimizer = dt.DistributedOptimizer(plain, local)
    assert isinstance(optimizer, keras.optimizers.Adam)
    assert keras.optimizers.serialize(optimizer) == serialized
    assert type(keras.optimizers.deserialize(serialized)) is keras.optimizers.Adam
    again = type(optimizer).from_config(optimizer.get_config())
    assert type(again) is type(optimizer)
    assert again.get_config() == optimizer.get_config()


def test_a_built_optimizer_keeps_its_state(local):
    variable, optimizer = keras.Variable([1.0, 2.0]), keras.optimizers.SGD(0.5, momentum=0.9)
    optimizer.apply([tf.ones([2])], [variable])
    state = [v.numpy().tolist() for v in optimizer.variables]
    optimizer = dt.DistributedOptimizer(optimizer, local)
    assert [v.numpy().tolist() for v in optimizer.variables] == state
    optimizer.apply([tf.ones([2])])
    np.testing.assert_allclose(variable.numpy(), [1 - 0.5 - 0.95, 2 - 0.5 - 0.95], rtol=1e-6)


def test_accumulators_are_not_among_the_optimizers_variables(local):
    variable = keras.Variable([0.0])
    optimizer = dt.DistributedOptimizer(keras.optimizers.SGD(1.0), local, backward_passes_per_step=3)
    seen = []
    for gradient in (1.0, 2.0, 6.0, 9.0):
        optimizer.apply_gradients([(tf.constant([gradient]), variable)])
        seen.append((float(variable[0]), int(optimizer.iterations)))
    assert seen == [(0.0, 0), (0.0, 0), (-3.0, 1), (-3.0, 1)]
    assert len(optimizer.variables) == 2


def test_compile_without_xla(local):
    model = cases.dense()
    model.compile(dt.DistributedOptimizer(keras.optimizers.SGD(), local), loss="mse")
    assert model.jit_compile is False
    with pytest.raises(dt.DisttrainError, match="jit_compile=True"):
        model.compile(dt.DistributedOptimizer(keras.optimizers.SGD(), local), loss="mse", jit_compile=True)
    model.compile(keras.optimizers.SGD(), loss="mse", jit_compile=True)
    assert model.jit_compile is True


def test_xla_in_a_loop_is_refused(local):
    variable, optimizer = keras.Variable([0.0]), dt.DistributedOptimizer(keras.optimizers.SGD(), local)
    apply = tf.function(lambda: optimizer.apply([tf.ones([1])], [variable]), jit_compile=True, autograph=False)
    with pytest.raises(dt.DisttrainError, match="jit_compile=True"):
        apply()


def test_loss_scaling_around_it_is_refused(local):
    optimizer = dt.DistributedOptimizer(keras.optimizers.SGD(), local)
    with pytest.raises(dt.DisttrainError, match="put it inside"):
        keras.optimizers.LossScaleOptimizer(optimizer)


@pytest.mark.parametrize(
    ("make", "options", "said"),
    [
        (lambda: "adam", {}, "keras.optimizers.Optimizer is wanted"),
        (lambda: keras.optimizers.SGD(gradient_accumulation_steps=2), {}, "backward_passes_per_step="),
        (keras.optimizers.SGD, {"backward_passes_per_step": 0}, "1 or more"),
        (keras.optimizers.SGD, {"op": "max"}, "'mean', 'sum' or 'adasum'"),
        (keras.optimizers.SGD, {"op": "adasum"}, "does not have it"),
    ],
)
def test_refusals(local, make, options, said):
    with pytest.raises(dt.DisttrainError, match=said):
        dt.DistributedOptimizer(make(), local, **options)


def test_twice_is_refused(local):
    optimizer = dt.DistributedOptimizer(keras.optimizers.SGD(), local)
    with pytest.raises(dt.DisttrainError, match="distributed already"):
        dt.DistributedOptimizer(optimizer, local)


def test_a_schedule_callback_and_an_optimizer_with_its_own_schedule(local):
    model = cases.dense()
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 1, 0.5)
    model.compile(dt.DistributedOptimizer(keras.optimizers.SGD(schedule), local), loss="mse")
    warmup = dt.callbacks.LearningRateWarmup(local, 0.1)
    with pytest.raises(dt.DisttrainError, match="schedule of its own"):
        model.fit(cases.INPUTS, cases.TARGETS, callbacks=[warmup], verbose=0)


def test_momentum_correction_scales_the_velocity(local):
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3)])
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
    model.compile(optimizer, loss="mse")
    optimizer.build(model.trainable_variables)
    optimizer.momentums[0].assign(tf.ones([6, 3]))
    callback = dt.callbacks.LearningRateSchedule(0.1, 0.5, start_epoch=1)
    callback.set_model(model)
    callback.on_train_begin()
    for epoch, rate in ((0, 0.1), (1, 0.1), (3, 0.025)):
        callback.on_epoch_begin(epoch)
        callback.on_train_batch_begin(0)
        np.testing.assert_allclose(float(optimizer.learning_rate), rate, rtol=1e-6)
        np.testing.assert_allclose(optimizer.momentums[0][0, 0], rate / 0.1, rtol=1e-6)


def test_metrics_are_averaged_over_the_ranks_that_have_them():
    by_rank = [{"loss": (1.0, 1.0), "val_loss": (5.0, 2.0)}, {"loss": (4.0, 2.0)}, {"loss": (9.0, 0.0)}]
    assert weighted_means(by_rank) == {"loss": 3.0, "val_loss": 5.0}
