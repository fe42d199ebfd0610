"""One rank of a script that uses all of `disttrain.horovod`: collectives, optimizers, tapes, batch normalization, states."""

import os
from pathlib import Path

import dropin_cases as cases
import keras
import numpy as np
import tensorflow as tf
from _report import arrays, report

import disttrain.horovod as hvd
import disttrain.horovod.keras as hvd_keras

facts, weights = {}, {}
first = hvd.ProcessSet([0])
hvd.init(process_sets=[first])
rank, size = hvd.rank(), hvd.size()


def numbers(value):
    return tf.convert_to_tensor(value).numpy().tolist()


def keep(name, values):
    weights.update({f"{name}/{i}": np.asarray(value) for i, value in enumerate(values)})


def share(array):
    return cases.share(array, rank, size)


def step_with(optimizer, gradient):
    """What one step makes of a variable at zero."""
    variable = keras.Variable(np.zeros(len(gradient), np.float32))
    optimizer.apply_gradients([(tf.constant(gradient), variable)])
    return numbers(variable)


def collectives():
    variable = keras.Variable([1.0 + rank, 2.0])
    rows = tf.IndexedSlices(tf.ones([1, 2]) * (1.0 + rank), tf.constant([rank]), tf.constant([3, 2]))
    dense, whole, slices = hvd.grouped_allreduce([variable, tf.constant([rank]), rows], op=hvd.Sum)
    facts["collectives"] = {
        "allreduce": numbers(hvd.allreduce(variable)),
        "allreduce sum": numbers(hvd.allreduce(variable, average=False)),
        "max": numbers(hvd.allreduce(variable, op=hvd.Max)),
        "bfloat16": numbers(tf.cast(hvd.allreduce(tf.cast(variable, tf.bfloat16)), tf.float32)),
        "grouped": [numbers(dense), numbers(whole), numbers(slices)],
        "allgather": numbers(hvd.allgather(tf.fill([1 + rank], rank))),
        "grouped_allgather": [numbers(x) for x in hvd.grouped_allgather([variable, tf.constant([rank])])],
        "broadcast": numbers(hvd.broadcast(variable, root_rank=1)),
        "broadcast uint32": numbers(tf.cast(hvd.broadcast(tf.cast([rank, 7], tf.uint32), 1), tf.int32)),
        "alltoall": numbers(hvd.alltoall(tf.constant([10 * rank, 10 * rank + 1]))),
        "reducescatter": numbers(hvd.reducescatter(variable, op=hvd.Sum)),
        "grouped_reducescatter": [numbers(x) for x in hvd.grouped_reducescatter([variable], op=hvd.Sum)],
        "broadcast_object": hvd.broadcast_object({"rank": rank}, root_rank=1),
        "broadcast_object_fn": hvd.broadcast_object_fn(root_rank=1)({"rank": rank}),
        "allgather_object": hvd.allgather_object({"rank": rank}),
        "process set": numbers(hvd.allreduce(variable, process_set=first)) if rank == 0 else None,
        "keras": [
            numbers(hvd_keras.allreduce(np.array([1.0, rank]))),
            numbers(hvd_keras.allgather([rank])),
            numbers(hvd_keras.broadcast([rank], 1)),
            numbers(hvd_keras.reducescatter([1.0, 3.0 + rank])),
        ],
    }
    dropout = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2), keras.layers.Dropout(0.5)])
    hvd.broadcast_variables(dropout.variables, root_rank=0)
    keep("broadcast_variables", [v.numpy() for v in dropout.variables])


def float16():
    """A sum that float16 cannot hold, once as an op and once as a gradient, and a number that it cannot hold at all."""
    large, fp16 = np.full(20000, 60000.0, np.float32), hvd.Compression.fp16
    thin, context = fp16.compress(tf.constant(large))
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(1.0), compression=fp16)
    wanted = {
        "sum": (hvd.allreduce(large, op=hvd.Sum, compression=fp16), 120000.0),
        "average": (hvd.allreduce(large, compression=fp16), 60000.0),
        "grouped": (hvd.grouped_allreduce([large], compression=fp16)[0], 60000.0),
        "reducescatter": (hvd.reducescatter(large, compression=fp16, op=hvd.Sum), 120000.0),
        "beyond": (hvd.allreduce(1e6 * large, compression=fp16), 6e10),
        "optimizer": (-np.array(step_with(optimizer, large)), 60000.0),
        "by hand": (fp16.decompress(hvd.allreduce(thin, op=hvd.Sum), context), 120000.0),
        "small": (hvd.allreduce(large[:3], compression=fp16), 60000.0),
    }
    facts["float16"] = {name: float(np.abs(np.array(x) / y - 1).max()) for name, (x, y) in wanted.items()}
    facts["float16 leaves bfloat16"] = fp16.compress(tf.ones([2], tf.bfloat16))[0].dtype.name


class Halves:
    """A compression of the script's own."""

    @staticmethod
    def compress(tensor):
        return tf.cast(tensor / 2, tf.float16), tensor.dtype

    @staticmethod
    def decompress(tensor, ctx):
        return tf.cast(tensor, ctx) * 2


def optimizers():
    """What each option makes of the gradients [1, 2] and [2, 4] with a learning rate of 1."""
    mine = [1.0 + rank, 2.0 + 2 * rank]
    cases_ = {
        "average": {},
        "sum": {"op": hvd.Sum},
        "predivide": {"gradient_predivide_factor": 2.0},
        "own compression": {"compression": Halves},
        "groups": {"groups": 2},
        "process set": {"process_set": first},
    }
    facts["optimizers"] = {
        name: step_with(hvd.DistributedOptimizer(keras.optimizers.SGD(1.0), **options), mine)
        for name, options in cases_.items()
    }
    for name, average in (("passes summed", False), ("passes averaged", True)):
        variable = keras.Variable([0.0, 0.0])
        optimizer = hvd_keras.DistributedOptimizer(
            keras.optimizers.SGD(1.0), backward_passes_per_step=2, average_aggregated_gradients=average
        )
        for _ in range(2):
            optimizer.apply_gradients([(tf.constant(mine), variable)])
        facts["optimizers"][name] = numbers(variable)
    facts["optimizers"]["variables()"] = len(optimizer.variables())
    facts["optimizers"]["plain variables()"] = len(keras.optimizers.SGD().variables())


def local_layers():
    """The second layer is each rank's own: its gradient, the rank plus one, is divided by 2 and not reduced."""
    for name, scale in (("local", True), ("local, not scaled", False)):
        layers = [keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros") for _ in range(2)]
        for layer in layers:
            layer.build((1, 1))
        kernels = [layer.kernel for layer in layers]
        gradients = [tf.fill([1, 1], 1.0 + rank)] * 2
        optimizer = hvd.PartialDistributedOptimizer(
            keras.optimizers.SGD(1.0), local_layers=layers[1], scale_local_gradients=scale
        )
        optimizer.apply_gradients(zip(gradients, kernels, strict=True))
        with tf.GradientTape() as tape:
            loss = tf.add_n([tf.reduce_sum(g * k) for g, k in zip(gradients, kernels, strict=True)])
        tape = hvd.PartialDistributedGradientTape(tape, local_layers=layers[1], scale_local_gradients=scale)
        own, common = tape.get_local_and_global_gradients(loss, kernels)
        facts[name] = [float(k.numpy().item()) for k in kernels]
        facts[f"{name}, tape"] = [float(pairs[0][1].numpy().item()) for pairs in (common, own)]


def tapes():
    """`b` is not reached on rank 0, `c` nowhere."""
    a, b, c = (keras.Variable([1.0, 2.0], name=name) for name in "abc")

    def gradients(**options):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(a * (1.0 + rank)) + (tf.reduce_sum(b) if rank else 0.0)
        return hvd.DistributedGradientTape(tape, **options).gradient(loss, [a, b, c])

    def plain(values):
        return [None if x is None else numbers(x) for x in values]

    with hvd.DistributedGradientTape(tf.GradientTape()) as tape:
        loss = tf.reduce_sum(a * (1.0 + rank))
    facts["tapes"] = {
        "eager": plain(gradients()),
        "function": plain(tf.function(gradients)()),
        "sum": plain(gradients(op=hvd.Sum)),
        "as context, one source": numbers(tape.gradient(loss, a)),
    }


def batch_normalization():
    """Rows of one batch, 20 on rank 0 and 9 on rank 1, so that a mean of means would be seen."""
    layer = hvd.SyncBatchNormalization(momentum=0.5)
    inputs = tf.constant(cases.INPUTS[:29][slice(None, 20) if rank == 0 else slice(20, None)])
    factors = tf.constant(cases.INPUTS[29:58][slice(None, 20) if rank == 0 else slice(20, None)])
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        outputs = layer(inputs, training=True)
        loss = tf.reduce_sum(outputs * factors)
    gradients = tape.gradient(loss, [inputs, *layer.trainable_variables])
    keep("norm", [outputs, *gradients, *layer.non_trainable_variables])

    model = cases.normalized(hvd.SyncBatchNormalization)
    model.compile(hvd_keras.DistributedOptimizer(keras.optimizers.SGD(0.1, momentum=0.9)), loss="mse")
    options = {"batch_size": cases.BATCH // size, "shuffle": False, "verbose": 0}
    model.fit(share(cases.INPUTS), share(cases.TARGETS), **options)
    keep("norm in fit", model.get_weights())


def callbacks():
    """Horovod's callbacks: rank 0's weights, the mean of the ranks' losses, warmup to 0.1 and decay after it."""
    keras.utils.set_random_seed(rank)
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3)])
    model.compile(hvd_keras.DistributedOptimizer(keras.optimizers.SGD(0.1)), loss="mse")
    losses = []
    history = model.fit(
        share(cases.INPUTS),
        share(cases.TARGETS),
        batch_size=cases.BATCH // size,
        epochs=3,
        verbose=0,
        callbacks=[
            hvd_keras.callbacks.BroadcastGlobalVariablesCallback(0),
            keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: losses.append(logs["loss"])),
            hvd_keras.callbacks.MetricAverageCallback(),
            hvd_keras.callbacks.LearningRateWarmupCallback(0.1, warmup_epochs=2),
            hvd_keras.callbacks.LearningRateScheduleCallback(0.1, multiplier=lambda epoch: 0.5, start_epoch=2),
        ],
    ).history
    wanted = np.mean(hvd.allgather_object(losses), axis=0)
    facts["callbacks"] = [history["lr"], float(np.abs(wanted - history["loss"]).max())]
    keep("callbacks", model.get_weights())


def load_model():
    """Two batches, saved, loaded on all ranks, and two more: as four batches in one go."""
    path = Path(os.environ["REPORT_DIR"]) / "loaded.keras"
    inputs, targets, batch = share(cases.INPUTS), share(cases.TARGETS), cases.BATCH // size
    half, options = len(inputs) // 2, {"batch_size": batch, "shuffle": False, "verbose": 0}
    model = cases.dense()
    model.compile(hvd_keras.DistributedOptimizer(keras.optimizers.Adam(0.01)), loss="mse")
    model.fit(inputs[:half], targets[:half], **options)
    if rank == 0:
        model.save(path)
    hvd.allgather_object("saved")
    model = hvd_keras.load_model(path)
    model.fit(inputs[half:], targets[half:], **options)
    keep("loaded", model.get_weights())


def elastic_states():
    """Save, change and restore; then synchronize ranks that differ, in Horovod's own loop."""
    model = cases.dense()
    model.compile(hvd_keras.DistributedOptimizer(keras.optimizers.SGD(0.1, momentum=0.9)), loss="mse")
    variable = tf.Variable([float(rank)])
    states = [hvd_keras.elastic.KerasState(model, batch=1, epoch=rank), hvd.elastic.TensorFlowState([variable], step=3)]
    kernel, velocity = model.weights[0], model.optimizer.momentums[0]
    saved = kernel.numpy().copy()
    for state in states:
        state.commit()
    for changed in (kernel, velocity, variable):
        changed.assign(tf.ones_like(changed))
    states[0].batch, states[1].step = 5, 6
    for state in states:
        state.restore()
    restored = [
        bool((kernel.numpy() == saved).all()),
        float(np.abs(velocity.numpy()).max()),
        numbers(variable),
        states[0].batch,
        states[1].step,
    ]
    kernel.assign_add(tf.ones_like(kernel) * rank)

    @hvd.elastic.run
    def train(state):
        states[1].sync()
        options = {"batch_size": cases.BATCH // size, "verbose": 0, "epochs": 2, "shuffle": False}
        update = [hvd_keras.elastic.UpdateBatchStateCallback, hvd_keras.elastic.UpdateEpochStateCallback]
        update = [hvd_keras.elastic.CommitStateCallback(state, 2), *(callback(state) for callback in update)]
        steps = []
        update.append(keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: steps.append(state.batch)))
        count = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: steps.append(batch))
        model.fit(share(cases.INPUTS), share(cases.TARGETS), callbacks=[*update, count], **options)
        return [numbers(variable), state.epoch, state.batch, steps]

    facts["elastic"] = [restored, train(states[0])]
    keep("elastic", model.get_weights())


def fewer_batches():
    """Rank 1 has one batch, rank 0 two: the second is averaged over the world, of which one part is zero."""
    variable = tf.Variable([1.0])
    seen = []
    for _ in range(2 - rank):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(variable * (4.0 + 4 * rank))
        seen.append(numbers(hvd.DistributedGradientTape(tape).gradient(loss, [variable])[0]))
    hvd.join()
    facts["join"] = seen


collectives()
float16()
optimizers()
local_layers()
tapes()
batch_normalization()
callbacks()
load_model()
elastic_states()
fewer_batches()
report(rank=rank, **facts)
arrays(**weights)
hvd.shutdown()
