"""Every mistake of a user gives one clear error, and nothing is applied."""

import re
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import snapshot

import disttrain as dt
from disttrain.comm import _check_world as check_world
from disttrain.comm import _choose as choose
from disttrain.errors import BackendError, ConfigError, DataError, DisttrainError, LossError

X = np.random.default_rng(0).uniform(0, 1, (6, 4)).astype("float32")
Y = np.arange(6, dtype="int32") % 3


def build():
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(5, "relu"), keras.layers.Dense(3)])


def make(comm, loss_fn=None, optimizer=None, **options):
    with comm.scope():
        model, optimizer = build(), (optimizer or keras.optimizers.Adam)()
    loss_fn = loss_fn or dt.losses.sparse_categorical_crossentropy()
    return dt.TrainStep(model, optimizer, loss_fn=loss_fn, comm=comm, **{"jit": False, **options})


def refuses(step, batch, message, error=LossError):
    """The step raises, and weights and optimizer are untouched on all replicas."""
    before = snapshot(*step.model.variables, *step.optimizer.variables)
    with pytest.raises(error, match=message) as caught:
        step(batch)
    assert isinstance(caught.value, DisttrainError)
    assert snapshot(*step.model.variables, *step.optimizer.variables) == before


# Models, optimizers, options ------------------------------------------------------------------------------------------


def test_model_outside_the_scope(two):
    model = build()
    with two.scope():
        optimizer = keras.optimizers.SGD(0.1)
    with pytest.raises(ConfigError, match=r"dense\w*/kernel and 3 more variables were made outside comm.scope\(\)"):
        dt.TrainStep(model, optimizer, loss_fn=dt.losses.mean_squared_error(), comm=two)


def test_model_in_the_scope_of_another_communicator(two, three, local):
    with two.scope():
        model, optimizer = build(), keras.optimizers.SGD(0.1)
    for comm in (three, local):
        with pytest.raises(ConfigError, match=r"outside comm\.scope"):
            dt.TrainStep(model, optimizer, loss_fn=dt.losses.mean_squared_error(), comm=comm)


def test_plain_module_outside_the_scope(two):
    class Module(tf.Module):
        def __init__(self):
            super().__init__()
            self.kernel = tf.Variable(tf.ones([4, 1]), name="kernel")

    model = Module()
    with two.scope():
        optimizer = keras.optimizers.SGD(0.1)
    with pytest.raises(ConfigError, match=r"kernel .*outside comm\.scope"):
        dt.TrainStep(model, optimizer, loss_fn=lambda m, b: (b[0] @ m.kernel)[:, 0], comm=two)


def test_optimizer_outside_the_scope(two):
    with two.scope():
        model = build()
    with pytest.raises(ConfigError, match=r"the optimizer was made outside comm\.scope"):
        dt.TrainStep(model, keras.optimizers.SGD(0.1), loss_fn=dt.losses.mean_squared_error(), comm=two)


@pytest.mark.parametrize("backend", ["local", "mirrored2"])
def test_optimizer_built_for_other_variables(comms, backend):
    comm = comms[backend]
    with comm.scope():
        model, other, optimizer = build(), build(), keras.optimizers.Adam()
        optimizer.build(other.trainable_variables)
    message = (
        r"already built for other variables: it does not know \S*dense\w*/kernel, .*; it knows 4 that are not trained"
    )
    with pytest.raises(ConfigError, match=message):
        dt.TrainStep(model, optimizer, loss_fn=dt.losses.mean_squared_error(), comm=comm)


def test_optimizer_built_for_more_than_is_trained(local):
    model, optimizer = build(), keras.optimizers.Adam()
    optimizer.build(model.trainable_variables)
    loss_fn = dt.losses.mean_squared_error()
    with pytest.raises(ConfigError, match=r"it knows 2 that are not trained here\. Make a new optimizer"):
        dt.TrainStep(model, optimizer, loss_fn=loss_fn, comm=local, variables=model.trainable_variables[2:])
    assert dt.TrainStep(model, optimizer, loss_fn=loss_fn, comm=local).optimizer is optimizer


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (
            lambda: keras.optimizers.SGD(0.1, gradient_accumulation_steps=2),
            "leave it out and give TrainStep accumulate=",
        ),
        (lambda: keras.optimizers.SGD(0.1, loss_scale_factor=8.0), "loss_scale_factor: leave it out"),
        (lambda: "adam", "optimizer is str; a keras.optimizers.Optimizer is wanted"),
    ],
)
def test_optimizers_that_cannot_be_used(local, optimizer, message):
    with pytest.raises(ConfigError, match=message):
        make(local, optimizer=optimizer)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"on_none": "ignore"}, "on_none='ignore': use one of 'error', 'zeros', 'skip'"),
        ({"on_nonfinite": "warn"}, "on_nonfinite='warn': use one of 'raise', 'skip'"),
        ({"jit": "always"}, "jit='always': use one of True, False, 'auto'"),
        ({"accumulate": 0}, "accumulate=0: a whole number of 1 or more is wanted"),
        ({"accumulate": 2.0}, "accumulate=2.0: a whole number of 1 or more is wanted"),
        ({"variables": []}, "no variables to train"),
        ({"variables": dt.transforms.freeze("nowhere/*")}, "freeze.*'nowhere/\\*' fits none of the variables .*dense"),
        ({"after_reduce": [dt.transforms.only("nowhere")]}, "only.*'nowhere' fits none of the variables .*dense"),
        ({"before_reduce": [dt.transforms.freeze("*")]}, "freeze.* leaves no variable to train"),
        ({"after_reduce": ["clip"]}, "'clip' is no transform"),
    ],
)
def test_options_that_cannot_be(two, option, message):
    with pytest.raises(ConfigError, match=message):
        make(two, **option)


def test_patterns_are_wanted():
    with pytest.raises(ConfigError, match="at least one pattern"):
        dt.transforms.freeze()


def test_model_with_nothing_to_train(local):
    model = build()
    model.trainable = False
    with pytest.raises(ConfigError, match="no variables to train: the model has no trainable variables"):
        dt.TrainStep(model, keras.optimizers.SGD(0.1), loss_fn=dt.losses.mean_squared_error(), comm=local)


def test_xla_and_synchronized_layers(two):
    with two.scope():
        model = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization(synchronized=True)])
        optimizer = keras.optimizers.SGD(0.1)
    with pytest.raises(ConfigError, match="jit=True: a layer with synchronized=True talks to the other replicas"):
        dt.TrainStep(model, optimizer, loss_fn=dt.losses.mean_squared_error(), comm=two, jit=True)


# What loss_fn returns -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("jit", [False, True, "auto"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (lambda y: tf.reduce_mean(y), r"0-d tensor. A mean cannot be summed"),
        (lambda y: tf.square(y), r"losses of shape \(\w+, 3\); a vector \[examples\] is wanted"),
        (lambda y: None, "loss_fn returned NoneType; return dt.Loss"),
        (lambda y: (tf.reduce_sum(y), 3), "loss_fn returned tuple; return dt.Loss"),
        (lambda y: dt.Loss(tf.reduce_sum(y, -1), 3.0), r"total has shape \(\w+,\); a scalar is wanted"),
        (lambda y: dt.Loss(tf.reduce_sum(y), tf.ones([2])), r"weight has shape \(2,\); a scalar is wanted"),
        (lambda y: dt.Loss(tf.reduce_sum(y), 1.0, {"m": (y, 1.0)}), "metric 'm' has shape"),
    ],
)
def test_losses_that_cannot_be_summed(two, value, message, jit):
    step = make(two, lambda model, batch: value(model(batch[0])), jit=jit)
    refuses(step, (X, Y), message)


@pytest.mark.parametrize("backend", ["local", "mirrored2"])
def test_weight_zero_everywhere(comms, backend):
    step = make(comms[backend], accumulate=2)
    refuses(step, (X, Y, np.zeros(6, "float32")), "weight 0 over all replicas: .*sample weight 0; nothing was applied")
    refuses(step, (X[:0], Y[:0]), "weight 0 over all replicas: the batch is empty")
    assert step((X, Y)).applied


# Labels and batches ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("label", [-1, 3, 77])
@pytest.mark.parametrize("backend", ["local", "mirrored2", "mirrored3"])
def test_labels_out_of_range(comms, backend, label, jit):
    step = make(comms[backend], jit=jit)
    wrong = Y.copy()
    wrong[4] = label
    refuses(step, (X, wrong), "labels are 0 to 2, as the outputs have 3 classes: not so for 1 of the batch; nothing")
    assert step((X, Y)).applied


def test_ignored_labels_may_be_out_of_range_but_no_others(two):
    step = make(two, dt.losses.sparse_categorical_crossentropy(ignore=-1))
    assert step((X, np.array([0, -1, 2, -1, 1, 0]))).weight == 4
    refuses(step, (X, np.array([0, -2, 2, -1, 1, 3])), "not so for 2 of the batch")
    refuses(step, (X, np.full(6, -1)), "weight 0 over all replicas")


@pytest.mark.parametrize(
    ("loss", "labels", "message"),
    [
        (
            "sparse_categorical_crossentropy",
            np.eye(3)[Y].astype("int32"),
            r"labels of shape .* do not fit outputs of shape",
        ),
        ("sparse_categorical_crossentropy", Y.astype("float32"), "labels are float32; integers are wanted"),
        ("categorical_crossentropy", Y, "do not fit outputs of shape .*they must be equal"),
        (
            "categorical_crossentropy",
            np.eye(4, dtype="float32")[Y],
            r"\(\w+, 4\) do not fit outputs of shape \(\w+, 3\)",
        ),
        ("binary_crossentropy", np.zeros((6, 2), "float32"), r"\(\w+, 2\) do not fit outputs of shape \(\w+, 3\)"),
        ("mean_squared_error", np.zeros(6, "float32"), "do not fit outputs of shape"),
        ("mean_absolute_error", np.zeros((6, 1), "float32"), r"\(\w+, 1\) do not fit outputs of shape \(\w+, 3\)"),
    ],
)
def test_labels_that_do_not_fit_the_outputs(two, loss, labels, message):
    refuses(make(two, getattr(dt.losses, loss)()), (X, labels), message)


def test_labels_of_one_column_do_not_broadcast(two):
    """[n] labels fit [n, 1] outputs as one column, never as [n, n]."""
    with two.scope():
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        optimizer = keras.optimizers.SGD(0.0)
    step = dt.TrainStep(model, optimizer, loss_fn=dt.losses.mean_squared_error(), comm=two, jit=False)
    target = X.sum(1)
    wanted = np.mean((np.array(model(X))[:, 0] - target) ** 2)
    np.testing.assert_allclose(step((X, target)).loss, wanted, rtol=1e-5)


def test_sample_weights_that_do_not_fit(two):
    refuses(make(two), (X, Y, np.ones((6, 2), "float32")), "weights of shape .* do not fit losses of shape")


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((X, Y[:5]), r"differ in their number of examples: shapes \(6, 4\), \(5,\)"),
        ((X, np.int32(1)), "the batch holds a scalar"),
        ((), "holds no tensors"),
    ],
)
@pytest.mark.parametrize("backend", ["local", "mirrored2"])
def test_batches_that_are_none(comms, backend, batch, message):
    refuses(make(comms[backend]), batch, message, DataError)


def test_shares_are_checked_as_well(two):
    shares = two.per_replica([(tf.constant(X), tf.constant(Y)), (tf.constant(X), tf.constant(Y[:5]))])
    refuses(make(two), shares, "differ in their number of examples", DataError)


def test_batches_of_another_form(two):
    refuses(make(two), {"x": X, "y": Y}, r"take batches \(inputs, labels\)", DataError)


# Backends -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("replicas", [0, -1, 1.5, "2"])
def test_replicas_are_counted_from_one(replicas):
    with pytest.raises(ConfigError, match=f"replicas={replicas!r}: a whole number of 1 or more is wanted"):
        dt.init("mirrored", replicas=replicas)


def test_local_has_one_replica():
    with pytest.raises(ConfigError, match="'local' has one replica a process, 2 asked for: use backend 'mirrored'"):
        dt.init("local", replicas=2)
    assert dt.init("local", replicas=1).size == 1


def test_unknown_backend():
    with pytest.raises(BackendError, match="unknown backend 'gloo': use 'auto', 'local', 'mirrored'"):
        dt.init("gloo")


def test_auto_takes_mirrored_where_replicas_are_asked_for():
    assert (dt.init().name, dt.init(replicas=1).name, dt.init(replicas=2).name) == ("local", "local", "mirrored")


@pytest.mark.parametrize(
    ("rank", "size"),
    [("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), ("PMI_RANK", "PMI_SIZE"), ("HOROVOD_RANK", "HOROVOD_SIZE")],
)
def test_auto_goes_by_what_the_launcher_says(monkeypatch, rank, size):
    monkeypatch.setenv(rank, "0")
    monkeypatch.setenv(size, "1")
    assert dt.init().name == "local"
    monkeypatch.setenv(size, "2")
    assert choose(None) == "horovod"
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
    assert choose(None) == "mpi"
    monkeypatch.delenv(size)
    monkeypatch.setenv("TF_CONFIG", "{}")
    assert choose(None) == "multiworker"


@pytest.mark.parametrize(
    ("environment", "backend"),
    [
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}, "multiworker"),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "PMIX_RANK": "0"}, "horovod"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "multiworker"),
        ({"JOB_COMPLETION_INDEX": "0", "DISTTRAIN_HOSTS": "a:1,b:1"}, "multiworker"),
    ],
)
def test_auto_in_slurm_under_torchrun_and_in_kubernetes(monkeypatch, environment, backend):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert choose(None) == backend


def test_a_process_that_is_alone_although_a_launcher_started_several(monkeypatch, local):
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(BackendError, match="mpirun started 2 processes, but backend 'local' sees one"):
        check_world(local)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "1")
    monkeypatch.setenv("DISTTRAIN_WORLD_SIZE", "3")
    with pytest.raises(BackendError, match="`disttrain run` started 3 ranks, but backend 'local' sees 1"):
        check_world(local)


@pytest.mark.parametrize("options", [{"wire_dtype": "float8"}, {"bucket_mib": 0}, {"stall_timeout": -1}])
def test_options_of_engines(options):
    (name,) = options
    with pytest.raises(ConfigError, match=f"{name}="):
        dt.init("mpi", **options)


def test_mirrored_asks_for_more_cpus_than_tensorflow_started_with():
    message = "7 replicas need 7 logical CPU devices, but TensorFlow has already started with 3: call dt.init before"
    with pytest.raises(BackendError, match=message):
        dt.init("mirrored", replicas=7)


def test_importing_disttrain_does_not_import_tensorflow():
    code = "import sys, disttrain; assert disttrain.__version__; assert 'tensorflow' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match=re.escape("module 'disttrain' has no attribute 'minimize'")):
        dt.minimize  # noqa: B018


def test_keras_on_another_engine(monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(BackendError, match="Keras runs on jax, not TensorFlow: set KERAS_BACKEND=tensorflow"):
        dt.init("local")
