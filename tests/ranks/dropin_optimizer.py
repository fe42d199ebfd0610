"""One rank with `dt.DistributedOptimizer`: fit, loops, gradients that are None, float16, callbacks, saving."""

import os
from pathlib import Path

import dropin_cases as cases
import keras
import numpy as np
import tensorflow as tf
from _report import BACKEND, arrays, report

import disttrain as dt

comm = dt.init(BACKEND)
folder, facts, weights = Path(os.environ["REPORT_DIR"]), {}, {}
targets = cases.share(cases.TARGETS, comm.rank, comm.size)


def keep(name, values):
    weights.update({f"{name}/{i}": value for i, value in enumerate(values)})


def fit_cases():
    for name, (make_model, inputs, make_optimizer, _, passes) in cases.CASES.items():
        model = make_model()
        optimizer = dt.DistributedOptimizer(make_optimizer(), comm, backward_passes_per_step=passes)
        model.compile(optimizer, loss=keras.losses.MeanSquaredError())
        share = cases.share(inputs, comm.rank, comm.size)
        model.fit(share, targets, batch_size=cases.BATCH // comm.size, shuffle=False, verbose=0)
        keep(name, model.get_weights())
        facts[f"iterations of {name}"] = int(optimizer.iterations)
        if name.startswith("adam") and comm.is_chief:
            model.save(folder / "model.keras")
            model.save(folder / "model.h5")


def loops():
    """The same as in `fit`, step by step: eagerly, and in a function, with an optimizer that came from a config."""
    make_model, inputs, make_optimizer, _, _ = cases.CASES["adam, clipvalue"]
    share, size = cases.share(inputs, comm.rank, comm.size), cases.BATCH // comm.size
    for name, wrap in (("eager", lambda fn: fn), ("function", tf.function)):
        model, optimizer = make_model(), dt.DistributedOptimizer(make_optimizer(), comm)
        optimizer = type(optimizer).from_config(optimizer.get_config())

        def step(x, y, model=model, optimizer=optimizer):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(model(x) - y))
            gradients = tape.gradient(loss, model.trainable_variables)
            optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))

        step = wrap(step)
        for begin in range(0, len(share), size):
            step(share[begin : begin + size], targets[begin : begin + size])
        keep(name, model.get_weights())


def none_somewhere():
    """Gradients of ones: `a` everywhere, `b` on rank 1 only, `c` nowhere, rows 1 and 1 of `d` on rank 0 only."""
    a, b, c = (keras.Variable([1.0, 2.0], name=name) for name in "abc")
    d = keras.Variable(np.ones((4, 2), np.float32), name="d")
    optimizer = dt.DistributedOptimizer(keras.optimizers.SGD(1.0, momentum=0.5), comm)

    def apply():
        ones, rows = tf.ones([2]), tf.IndexedSlices(tf.ones([2, 2]), tf.constant([1, 1]), tf.constant([4, 2]))
        here = comm.rank == 1
        optimizer.apply_gradients([(ones, a), (ones if here else None, b), (None, c), (None if here else rows, d)])

    apply()
    tf.function(apply)()
    facts["none"] = [v.numpy().tolist() for v in (a, b, c, d)]


def refusals():
    wrong = keras.Variable(np.zeros(2 + comm.rank, np.float32))
    try:
        dt.DistributedOptimizer(keras.optimizers.SGD(), comm).apply_gradients([(tf.zeros_like(wrong), wrong)])
    except dt.DisttrainError as error:
        facts["differ"] = str(error)


def adasum():
    """Equal gradients give one of them, orthogonal ones their sum."""
    facts["adasum"] = []
    for mine in ([1.0, 0.0], [1.0, 0.0] if comm.rank else [0.0, 1.0]):
        variable = keras.Variable([0.0, 0.0])
        try:
            optimizer = dt.DistributedOptimizer(keras.optimizers.SGD(1.0), comm, op="adasum")
        except dt.DisttrainError as error:
            facts["adasum"].append(str(error))
            continue
        optimizer.apply_gradients([(tf.constant(mine), variable)])
        facts["adasum"].append(variable.numpy().tolist())


def float16():
    """Keras itself puts the loss scale around the optimizer; the third of four batches is NaN on rank 1."""
    keras.mixed_precision.set_global_policy("mixed_float16")
    model, optimizer = cases.dense(), dt.DistributedOptimizer(keras.optimizers.SGD(0.1), comm)
    keras.mixed_precision.set_global_policy("float32")
    model.compile(optimizer, loss="mse", steps_per_execution=2)
    inputs = cases.share(cases.INPUTS, comm.rank, comm.size).copy()
    inputs[2 * cases.BATCH // comm.size] += np.nan if comm.rank == 1 else 0.0
    model.fit(inputs, targets, batch_size=cases.BATCH // comm.size, shuffle=False, verbose=0)
    facts["float16"] = [float(model.optimizer.dynamic_scale.numpy()), int(model.optimizer.iterations)]
    keep("float16", model.get_weights())


def callbacks():
    """Ranks start from weights of their own and have metrics of their own."""
    keras.utils.set_random_seed(comm.rank)
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3)])
    rate = 0.01
    model.compile(dt.DistributedOptimizer(keras.optimizers.SGD(rate, momentum=0.9), comm), loss="mse")
    before = comm.all_gather_object(model.get_weights()[0].tobytes())
    size, plain = cases.BATCH // comm.size, []
    history = model.fit(
        cases.share(cases.INPUTS, comm.rank, comm.size),
        targets,
        batch_size=size,
        epochs=2,
        verbose=0,
        callbacks=[
            dt.callbacks.Broadcast(comm),
            keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: plain.append(logs["loss"])),
            dt.callbacks.MetricAverage(comm, examples=1 + 2 * comm.rank),
            dt.callbacks.LearningRateWarmup(comm, rate, warmup_epochs=2),
        ],
    ).history
    losses = comm.all_gather_object(plain)
    facts["callbacks"] = {
        "started apart": len(set(before)) == comm.size,
        "losses": history["loss"],
        "wanted": np.average(losses, axis=0, weights=[1 + 2 * rank for rank in range(comm.size)]).tolist(),
        "rates": history["learning_rate"],
    }
    keep("callbacks", model.get_weights())


fit_cases()
loops()
none_somewhere()
refusals()
adasum()
float16()
callbacks()
comm.barrier()
if comm.is_chief:
    facts["saved"] = {name: (folder / name).read_bytes().hex() for name in ("model.keras", "model.h5")}
report(**facts)
arrays(**weights)
comm.close()
