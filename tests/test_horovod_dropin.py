"""`disttrain.horovod`: Horovod's names and meaning on Keras 3, by two real processes, and its users' scripts."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import dropin_cases as cases
import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import relative_error
from once import once

from launch import launch

LIMIT = 1e-6
SCRIPTS = Path(__file__).parent / "ranks"
# Ranks that wait leave the core to others: there may be more processes than cores.
YIELD = {"OMPI_MCA_mpi_yield_when_idle": "1"}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What two ranks of `ranks/dropin_api.py` have to say."""
    return once(
        tmp_path_factory, "dropin_api", lambda: launch("horovod", 2, "dropin_api", timeout=240, env=YIELD).check()
    )


def kept(result, name):
    """For each rank the arrays that it kept under a name."""
    by_rank = []
    for arrays in result.arrays:
        count = sum(key.startswith(f"{name}/") for key in arrays)
        by_rank.append([arrays[f"{name}/{i}"] for i in range(count)])
    return by_rank


def assert_same_bits(by_rank):
    first, second = by_rank
    assert len(first) == len(second) > 0
    assert all(a.tobytes() == b.tobytes() for a, b in zip(first, second, strict=True))


def said(result, name):
    return [report[name] for report in result.reports]


# Scripts ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "module"), [("dropin_keras_mnist", "tensorflow.keras"), ("dropin_tf2_mnist", "tensorflow")]
)
def test_a_script_for_horovod_with_the_import_changed(script, module, tmp_path):
    ours = module.replace("tensorflow", "disttrain.horovod", 1)
    about_us = [line for line in (SCRIPTS / f"{script}.py").read_text().splitlines() if "disttrain" in line]
    assert about_us == [f"import {ours} as hvd"]
    result = launch("horovod", 2, script, tmp_path, timeout=240, env=YIELD)
    assert result.returncode == 0, result.output[-4000:]
    by_rank = []
    for rank in range(2):
        with np.load(tmp_path / f"{rank}.npz") as saved:
            by_rank.append(list(saved.values()))
    assert_same_bits(by_rank)
    assert by_rank[0][0] > 0.8, result.output[-4000:]
    if script == "dropin_keras_mnist":
        assert "finished gradual learning rate warmup to 0.002" in result.output
        assert type(keras.saving.load_model(tmp_path / "checkpoint-4.h5").optimizer) is keras.optimizers.Adam


# Collectives ------------------------------------------------------------------------------------------------------------


def test_collectives(ranks):
    ours, theirs = said(ranks, "collectives")
    equal = {
        "allreduce": [1.5, 2.0],
        "allreduce sum": [3.0, 4.0],
        "max": [2.0, 2.0],
        "bfloat16": [1.5, 2.0],
        "grouped": [[3.0, 4.0], [1], [[1.0, 1.0], [2.0, 2.0], [0.0, 0.0]]],
        "allgather": [0, 1, 1],
        "grouped_allgather": [[1.0, 2.0, 2.0, 2.0], [0, 1]],
        "broadcast": [2.0, 2.0],
        "broadcast uint32": [1, 7],
        "broadcast_object": {"rank": 1},
        "broadcast_object_fn": {"rank": 1},
        "allgather_object": [{"rank": 0}, {"rank": 1}],
    }
    for name, value in equal.items():
        assert (ours[name], theirs[name]) == (value, value), name
    assert (ours["alltoall"], theirs["alltoall"]) == ([0, 10], [1, 11])
    assert (ours["reducescatter"], theirs["reducescatter"]) == ([3.0], [4.0])
    assert (ours["grouped_reducescatter"], theirs["grouped_reducescatter"]) == ([[3.0]], [[4.0]])
    assert ours["process set"] == [1.0, 2.0]
    assert (ours["keras"], theirs["keras"]) == ([[1.0, 0.5], [0, 1], [1], [1.0]], [[1.0, 0.5], [0, 1], [1], [3.5]])
    assert_same_bits(kept(ranks, "broadcast_variables"))


def test_float16_does_not_overflow(ranks):
    for errors in said(ranks, "float16"):
        assert max(errors.values()) < 1e-3, errors
    assert said(ranks, "float16 leaves bfloat16") == ["bfloat16"] * 2


def test_a_rank_without_batches_joins(ranks):
    assert said(ranks, "join") == [[[6.0], [2.0]], [[6.0]]]


# Optimizers and tapes ---------------------------------------------------------------------------------------------------


def test_options_of_the_optimizer(ranks):
    mean = [-1.5, -3.0]
    for rank, steps in enumerate(said(ranks, "optimizers")):
        for name in ("average", "predivide", "own compression", "groups", "passes averaged"):
            assert steps[name] == mean, name
        for name in ("sum", "passes summed"):
            assert steps[name] == [-3.0, -6.0], name
        assert steps["process set"] == [[-1.0, -2.0], [-2.0, -4.0]][rank]
        assert (steps["variables()"], steps["plain variables()"]) == (2, 2)


def test_local_layers_are_each_ranks_own(ranks):
    for rank, report in enumerate(ranks.reports):
        own = 1.0 + rank
        assert report["local"] == [-1.5, -own / 2]
        assert report["local, not scaled"] == [-1.5, -own]
        assert report["local, tape"] == [1.5, own / 2]
        assert report["local, not scaled, tape"] == [1.5, own]


def test_tapes(ranks):
    # The second variable is reached on rank 1 only, the third nowhere.
    mean = [[1.5, 1.5], [0.5, 0.5], None]
    for tapes in said(ranks, "tapes"):
        assert tapes == {
            "eager": mean,
            "function": mean,
            "sum": [[3.0, 3.0], [1.0, 1.0], None],
            "as context, one source": [1.5, 1.5],
        }


def test_a_loaded_model_trains_on(ranks):
    by_rank = kept(ranks, "loaded")
    assert_same_bits(by_rank)
    before, *_, after = cases.one_device(cases.dense(), keras.optimizers.Adam(0.01), cases.INPUTS)
    assert relative_error(by_rank[0], before, after) <= LIMIT


# Batch normalization ----------------------------------------------------------------------------------------------------


def test_batch_normalization_counts_every_example_once(ranks):
    layer, inputs = keras.layers.BatchNormalization(momentum=0.5), tf.constant(cases.INPUTS[:29])
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        outputs = layer(inputs, training=True)
        loss = tf.reduce_sum(outputs * cases.INPUTS[29:58])
    wanted = [outputs, *tape.gradient(loss, [inputs, *layer.trainable_variables]), *layer.non_trainable_variables]
    (out0, in0, *scale0, mean0, var0), (out1, in1, *scale1, mean1, var1) = kept(ranks, "norm")
    joined = [np.concatenate([out0, out1]), np.concatenate([in0, in1])]
    # Of gamma and beta each rank has the gradient of its own examples.
    joined += [a + b for a, b in zip(scale0, scale1, strict=True)]
    assert_same_bits([[mean0, var0], [mean1, var1]])
    for got, value in zip([*joined, mean0, var0], wanted, strict=True):
        np.testing.assert_allclose(got, keras.ops.convert_to_numpy(value), rtol=1e-5, atol=1e-6)


def test_batch_normalization_in_fit(ranks):
    model, optimizer = cases.normalized(keras.layers.BatchNormalization), keras.optimizers.SGD(0.1, momentum=0.9)
    before, *_, after = cases.one_device(model, optimizer, cases.INPUTS)
    by_rank = kept(ranks, "norm in fit")
    assert_same_bits(by_rank)
    assert relative_error(by_rank[0], before, after) <= LIMIT


# Callbacks and states ---------------------------------------------------------------------------------------------------


def test_callbacks(ranks):
    for rates, error in said(ranks, "callbacks"):
        # Warmup from 1/2 to 1 in two epochs, then half.
        np.testing.assert_allclose(rates, [0.075, 0.1, 0.05], rtol=1e-6)
        assert error < 1e-6
    assert_same_bits(kept(ranks, "callbacks"))


def test_elastic_states(ranks):
    for rank, (restored, trained) in enumerate(said(ranks, "elastic")):
        assert restored == [True, 0.0, [float(rank)], 1, 3]
        # Rank 0's values; one batch of the first epoch was done before.
        assert trained == [[0.0], 2, 0, [0, 1, 2, 0, 0, 1, 2, 3, 0]]
    assert_same_bits(kept(ranks, "elastic"))


# In this process --------------------------------------------------------------------------------------------------------


def public(module):
    """Names that a module offers: not the modules and helpers that it imports for itself."""
    offered = getattr(module, "__all__", None) or [name for name in vars(module) if not name.startswith("_")]
    return {
        name
        for name in offered
        if not inspect.ismodule(getattr(module, name)) and name != "is_version_greater_equal_than"
    }


def test_every_name_of_horovod_is_there():
    import horovod.tensorflow as theirs
    import horovod.tensorflow.keras as their_keras

    import disttrain.horovod as ours
    import disttrain.horovod.keras as our_keras

    pairs = [(theirs, ours), (theirs.elastic, ours.elastic), (theirs.compression, ours.compression)]
    pairs += [
        (their_keras, our_keras),
        (their_keras.callbacks, our_keras.callbacks),
        (their_keras.elastic, our_keras.elastic),
    ]
    for theirs_, ours_ in pairs:
        missing = {name for name in public(theirs_) if not hasattr(ours_, name)}
        assert missing <= {"tf"}, theirs_.__name__
    assert all(hasattr(ours, name) for name in ("elastic", "mpi_ops", "util"))
    assert all(hasattr(our_keras, name) for name in ("callbacks", "elastic", "PartialDistributedOptimizer"))


@pytest.mark.parametrize("name", ["DistributedOptimizer", "DistributedGradientTape", "allreduce", "grouped_allreduce"])
def test_arguments_have_the_same_order(name):
    import horovod.tensorflow as theirs
    import horovod.tensorflow.keras as their_keras

    import disttrain.horovod as ours
    import disttrain.horovod.keras as our_keras

    for theirs_, ours_ in ((theirs, ours), (their_keras, our_keras)):
        if hasattr(theirs_, name):
            wanted = list(inspect.signature(getattr(theirs_, name)).parameters)
            assert list(inspect.signature(getattr(ours_, name)).parameters) == wanted


def test_without_horovod_the_import_says_what_to_do():
    script = "import sys; sys.modules['horovod'] = None\nimport disttrain.horovod"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert re.search("BackendError: Horovod is not installed: run `disttrain build-horovod`", done.stderr), done.stderr


def test_what_it_does_not_do_it_says():
    import disttrain.horovod as hvd
    import disttrain.horovod.keras as hvd_keras

    hvd.init()
    for options, words in (
        ({"op": hvd.Max}, "Average, Sum or Adasum"),
        ({"op": hvd.Sum, "gradient_predivide_factor": 2.0}, "gradient_predivide_factor"),
        ({"op": hvd.Adasum, "average_aggregated_gradients": True}, "average_aggregated_gradients"),
        ({"groups": -1}, "groups"),
        ({"backward_passes_per_step": 0}, "1 or more"),
    ):
        with pytest.raises(ValueError, match=words):
            hvd.DistributedOptimizer(keras.optimizers.SGD(), **options)
    with pytest.raises(ValueError, match="fused"):
        hvd.SyncBatchNormalization(fused=True)
    with pytest.raises(ValueError, match="legacy"):
        hvd_keras.load_model("model.keras", legacy_opts=True)
    with pytest.raises(ValueError, match="initial_lr"):
        hvd_keras.callbacks.LearningRateWarmupCallback(None)
    with pytest.raises(RuntimeError, match="eager"):
        hvd.broadcast_global_variables(0)


def test_what_keras_3_has_dropped():
    import disttrain.horovod  # noqa: F401

    optimizer, model = keras.optimizers.SGD(0.5), cases.dense()
    assert len(optimizer.variables()) == len(optimizer.variables) == 2
    optimizer.lr = 0.25
    assert float(optimizer.lr) == float(optimizer.learning_rate) == 0.25
    model.compile(optimizer, loss="mse", experimental_run_tf_function=False)


def test_masked_examples_do_not_count():
    import disttrain.horovod as hvd

    hvd.init()
    inputs = tf.constant(cases.INPUTS[:12].reshape(3, 4, 6))
    mask = tf.constant([[True, True, False, False], [True] * 4, [False] * 4])
    ours, plain = hvd.SyncBatchNormalization(momentum=0.0), keras.layers.BatchNormalization(momentum=0.0)
    np.testing.assert_allclose(
        ours(inputs, training=True, mask=mask), plain(inputs, training=True, mask=mask), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(ours.moving_variance.numpy(), plain.moving_variance.numpy(), rtol=1e-5)
    again = keras.layers.deserialize(keras.layers.serialize(ours))
    assert type(again) is hvd.SyncBatchNormalization


def test_best_model_checkpoint_takes_its_path_later(tmp_path):
    from disttrain.horovod.keras.callbacks import BestModelCheckpoint

    checkpoint = BestModelCheckpoint(monitor="loss")
    assert checkpoint.filepath is None
    checkpoint.filepath = str(tmp_path / "best.keras")
    model = cases.dense()
    model.compile("sgd", loss="mse")
    model.fit(cases.INPUTS, cases.TARGETS, verbose=0, callbacks=[checkpoint])
    assert (tmp_path / "best.keras").exists()
