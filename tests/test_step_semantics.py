"""What a step counts, skips, freezes, refuses and reports."""

import logging

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import assert_replicas_equal, copies, relative_error, share, snapshot, weights

import disttrain as dt
from disttrain import transforms
from disttrain.errors import GradientError, NonFiniteError
from disttrain.gradients import jit as jit_module

LAYERS = keras.layers
X = np.random.default_rng(0).uniform(0.1, 1, (12, 4)).astype("float32")
Y = (5 + X.sum(1, keepdims=True)).astype("float32")
SIZES = {"local": [12], "mirrored2": [8, 4], "mirrored3": [7, 0, 5]}
BACKENDS = list(SIZES)


def fill(model):
    """The same positive weights for every model of one architecture."""
    rng = np.random.default_rng(1)
    for v in model.trainable_variables:
        v.assign(rng.uniform(0.1, 0.4, v.shape).astype("float32"))
    return model


def mlp(*extra):
    body, head = LAYERS.Dense(6, "sigmoid", name="body"), LAYERS.Dense(1, name="head")
    return fill(keras.Sequential([keras.Input((4,)), body, *extra, head], name="net"))


def squares(model, batch):
    return tf.square(model(batch[0], training=True) - batch[1])[:, 0]


def squares32(model, batch):
    """The same for a model of any dtype."""
    return tf.square(tf.cast(model(batch[0], training=True), tf.float32) - batch[1])[:, 0]


def make(comm, build=mlp, optimizer=lambda: keras.optimizers.SGD(0.05), loss_fn=squares, **options):
    with comm.scope():
        model, opt = build(), optimizer()
    return dt.TrainStep(model, opt, loss_fn=loss_fn, comm=comm, **{"jit": False, **options})


def deal(comm, *batch):
    return share(comm, batch or (X, Y), SIZES["local" if comm.size == 1 else f"mirrored{comm.size}"])


def state(step):
    """All bits that a step can change, on all replicas."""
    return snapshot(*step.model.variables, *step.optimizer.variables)


# Counting -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("backend", BACKENDS)
def test_schedule_counts_optimizer_steps(comms, backend, accumulate):
    """The gradient is 1 everywhere, so every step's change is the learning rate."""
    comm = comms[backend]

    def build():
        return keras.Sequential([keras.Input((4,)), LAYERS.Dense(1, use_bias=False, name="only")])

    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([1, 3], [1.0, 0.25, 0.0625])
    step = make(
        comm,
        build,
        lambda: keras.optimizers.SGD(schedule),
        lambda model, batch: model(tf.ones_like(batch[0]))[:, 0],
        accumulate=accumulate,
    )
    seen = []
    for index in range(6):
        before = step.model.get_weights()[0]
        assert step(deal(comm)).step == index + 1
        seen.append((before - step.model.get_weights()[0])[0, 0])
    np.testing.assert_allclose(seen, [1, 1, 0.25, 0.25, 0.0625, 0.0625], atol=1e-6)


def test_optimizer_state_moves_once_for_all_micro_batches(three):
    """Adam's moments after one step of five micro-batches are those of one gradient."""
    one, five = (make(three, optimizer=keras.optimizers.Adam, accumulate=n) for n in (1, 5))
    one(deal(three))
    five(deal(three))
    assert copies(five.optimizer.iterations) == [1, 1, 1]
    for a, b in zip(one.optimizer.variables, five.optimizer.variables, strict=True):
        np.testing.assert_allclose(b.numpy(), a.numpy(), rtol=1e-5)


def test_more_micro_batches_than_examples(three):
    few, many = make(three, accumulate=1), make(three, accumulate=50)
    before = weights(few.model)
    few(deal(three))
    many(deal(three))
    assert relative_error(weights(many.model), before, weights(few.model)) <= 1e-6


# Choosing variables ---------------------------------------------------------------------------------------------------

CHOICES = {
    "freeze": {"variables": transforms.freeze("body/*")},
    "only": {"variables": transforms.only("head/*")},
    "after_reduce": {"after_reduce": [transforms.freeze("body/*"), transforms.clip_by_global_norm(1.0)]},
    "before_reduce": {"before_reduce": [transforms.only("head/*")]},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("choice", [*CHOICES, "list"])
def test_frozen_weights_stay_as_they_are_and_cost_nothing(comms, backend, choice):
    comm, asked = comms[backend], []

    @tf.custom_gradient
    def watch(kernel):
        def gradient(upstream):
            asked.append(True)
            return upstream

        return tf.identity(kernel), gradient

    def loss_fn(model, batch):
        hidden = tf.sigmoid(batch[0] @ watch(model.layers[0].kernel.value))
        return tf.square(model.layers[1](hidden) - batch[1])[:, 0]

    with comm.scope():
        model, optimizer = mlp(), keras.optimizers.AdamW(0.1, weight_decay=0.1)
    options = CHOICES.get(choice) or {"variables": model.layers[1].trainable_variables}
    step = dt.TrainStep(model, optimizer, loss_fn=loss_fn, comm=comm, jit=False, **options)
    frozen, head = (snapshot(*layer.variables) for layer in model.layers)
    for _ in range(2):
        step(deal(comm))
    assert snapshot(*model.layers[0].variables) == frozen
    assert snapshot(*model.layers[1].variables) != head
    assert len(optimizer.variables) == 2 + 2 * 2  # iterations, learning rate, two moments of kernel and bias
    assert [v.path for v in step.variables] == ["net/head/kernel", "net/head/bias"]
    assert not asked


def test_the_gradient_watch_above_can_notice(local):
    asked = []

    @tf.custom_gradient
    def watch(kernel):
        def gradient(upstream):
            asked.append(True)
            return upstream

        return tf.identity(kernel), gradient

    def loss_fn(model, batch):
        hidden = tf.sigmoid(batch[0] @ watch(model.layers[0].kernel.value) + model.layers[0].bias)
        return tf.square(model.layers[1](hidden) - batch[1])[:, 0]

    make(local, loss_fn=loss_fn)(deal(local))
    assert asked


def head_only(model, batch):
    return tf.square(model.layers[1](tf.ones([tf.shape(batch[0])[0], 6])) - batch[1])[:, 0]


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("backend", ["local", "mirrored3"])
def test_unreached_variables_are_errors_that_name_them_all(comms, backend, jit):
    comm = comms[backend]
    step = make(comm, loss_fn=head_only, jit=jit)
    before = state(step)
    with pytest.raises(GradientError, match="does not reach net/body/kernel, net/body/bias: leave them out"):
        step(deal(comm))
    assert state(step) == before


@pytest.mark.parametrize("on_none", ["error", "zeros", "skip"])
def test_a_loss_that_reaches_nothing_is_an_error_always(two, on_none):
    step = make(two, loss_fn=lambda model, batch: tf.square(batch[1])[:, 0], on_none=on_none)
    with pytest.raises(GradientError, match="net/body/kernel, net/body/bias, net/head/kernel, net/head/bias"):
        step(deal(two))


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("on_none", ["zeros", "skip"])
def test_unreached_variables_as_zeros_or_skipped(comms, backend, on_none, accumulate):
    """A zero gradient still meets weight decay; a skipped variable is not touched at all."""
    comm = comms[backend]
    step = make(
        comm,
        optimizer=lambda: keras.optimizers.AdamW(0.1, weight_decay=0.1),
        loss_fn=head_only,
        on_none=on_none,
        accumulate=accumulate,
    )
    body, head = (snapshot(*layer.variables) for layer in step.model.layers)
    out = step(deal(comm))
    step(deal(comm))
    assert snapshot(*step.model.layers[1].variables) != head
    assert (snapshot(*step.model.layers[0].variables) == body) == (on_none == "skip")
    assert_replicas_equal(comm, [*step.model.variables, *step.optimizer.variables])
    assert out.grad_norm > 0


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("on_none", ["error", "zeros", "skip"])
@pytest.mark.parametrize("alone", [0, 2])
def test_none_on_some_replicas_counts_as_zero(three, on_none, alone, accumulate):
    def only_there(model, batch):
        return squares(model, batch) if three.replica_id() == alone else head_only(model, batch)

    step = make(three, loss_fn=only_there, on_none=on_none, accumulate=accumulate)
    before = weights(step.model)
    step(deal(three))
    rows = slice(0, 7) if alone == 0 else slice(7, 12)
    others = slice(7, 12) if alone == 0 else slice(0, 7)
    model = mlp()
    with tf.GradientTape() as tape:
        mine, theirs = squares(model, (X[rows], Y[rows])), head_only(model, (X[others], Y[others]))
        loss = (tf.reduce_sum(mine) + tf.reduce_sum(theirs)) / 12
    gradients = tape.gradient(loss, model.trainable_weights)
    keras.optimizers.SGD(0.05).apply_gradients(zip(gradients, model.trainable_variables, strict=True))
    assert relative_error(weights(step.model), before, weights(model)) <= 1e-6
    assert_replicas_equal(three, step.model.variables)


# NaN and infinity -----------------------------------------------------------------------------------------------------


def poisoned(value=np.nan):
    x = X.copy()
    x[9, 2] = value  # an example of the last replica
    return x, Y


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nonfinite_gradients_raise_and_say_where(comms, backend, accumulate, value):
    comm = comms[backend]
    linear = [keras.Input((4,)), LAYERS.Dense(2, name="body"), LAYERS.Dense(1, name="head")]
    step = make(comm, lambda: fill(keras.Sequential(linear)), keras.optimizers.Adam, accumulate=accumulate)
    assert step(deal(comm)).applied
    before = state(step)
    message = (
        rf"at step 2: loss (nan|inf), gradients of \S*body/kernel, .*on replicas: {comm.size - 1}\. Nothing was applied"
    )
    with pytest.raises(NonFiniteError, match=message):
        step(deal(comm, *poisoned(value)))
    assert state(step) == before
    assert step(deal(comm)).step == 2


def test_the_message_names_only_the_variables_that_are_not_finite(three):
    @tf.custom_gradient
    def explode(kernel):
        return tf.identity(kernel), lambda upstream: upstream * np.float32(np.inf)

    def loss_fn(model, batch):
        hidden = tf.sigmoid(batch[0] @ model.layers[0].kernel.value + model.layers[0].bias.value)
        kernel = model.layers[1].kernel.value
        kernel = explode(kernel) if three.replica_id() == 2 else kernel
        return tf.square(hidden @ kernel + model.layers[1].bias.value - batch[1])[:, 0]

    step = make(three, loss_fn=loss_fn)
    with pytest.raises(NonFiniteError, match=r"gradients of net/head/kernel; on replicas: 2\."):
        step(deal(three))


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nonfinite_steps_are_skipped_as_if_they_had_never_been(comms, backend, accumulate, jit):
    comm = comms[backend]

    def build():
        return mlp(LAYERS.BatchNormalization(), LAYERS.Dropout(0.3, seed=3))

    def new():
        return make(
            comm, build, lambda: keras.optimizers.Adam(0.01), on_nonfinite="skip", accumulate=accumulate, jit=jit
        )

    step, undisturbed = new(), new()
    assert step(deal(comm)).applied
    before = state(step)
    out = step(deal(comm, *poisoned()))
    assert out.applied is False
    assert out.step == 1
    assert np.isnan(out.loss)
    assert state(step) == before
    assert step(deal(comm)).step == 2
    undisturbed(deal(comm))
    undisturbed(deal(comm))
    assert state(step) == state(undisturbed)


# Mixed precision ------------------------------------------------------------------------------------------------------


@pytest.fixture
def policy():
    yield keras.config.set_dtype_policy
    keras.config.set_dtype_policy("float32")


def settle(step, comm):
    """Steps until one is applied: a dynamic scale starts high, and comes down by skipping."""
    for _ in range(10):
        out = step(deal(comm))
        if out.applied:
            return out
    raise AssertionError("the loss scale does not settle")


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("name", ["mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize("backend", ["local", "mirrored3"])
def test_mixed_precision_trains(comms, backend, name, jit, policy):
    comm = comms[backend]
    exact = make(comm)
    policy(name)
    step = make(comm, loss_fn=squares32, accumulate=2, jit=jit)
    before = weights(step.model)
    first = settle(step, comm)
    exact(deal(comm))
    assert relative_error(weights(step.model), before, weights(exact.model)) < 0.02
    for _ in range(30):
        out = step(deal(comm))
    assert out.loss < 0.1 * first.loss
    assert {v.dtype for v in step.model.variables} == {"float32"}
    assert_replicas_equal(comm, [*step.model.variables, *step.optimizer.variables])


@pytest.mark.parametrize("backend", BACKENDS)
def test_float16_overflow_halves_the_scale_and_skips(comms, backend, policy):
    comm = comms[backend]
    policy("mixed_float16")
    step = make(comm, optimizer=keras.optimizers.Adam, loss_fn=squares32)
    settle(step, comm)
    first = copies(step._loss_scale.scale)
    before = state(step)
    large = Y.copy()
    large[9] = 1e4  # the gradient of one example, times the scale, is beyond float16; the loss is finite
    out = step(deal(comm, X, large))
    assert out.applied is False
    assert out.step == 1
    assert np.isfinite(out.loss)
    assert state(step) == before
    assert copies(step._loss_scale.scale) == [s / 2 for s in first]
    assert step(deal(comm)).step == 2
    for _ in range(20):
        if step(deal(comm, X, large)).applied:
            break
    assert out.step < step(deal(comm)).step
    assert step.optimizer.iterations.numpy() >= 3
    assert_replicas_equal(comm, [*step.model.variables, *step.optimizer.variables])


def test_float16_loss_scale_grows_after_good_steps(two, policy):
    policy("mixed_float16")
    scaled = lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.01), 64.0, 3)  # noqa: E731
    step = make(two, optimizer=scaled, loss_fn=squares32)
    assert isinstance(step.optimizer, keras.optimizers.SGD)
    seen = []
    for _ in range(7):
        step(deal(two))
        seen.append(copies(step._loss_scale.scale)[0])
    assert seen == [64, 64, 128, 128, 128, 256, 256]


def test_loss_scale_cannot_hide_a_loss_that_is_not_finite(two, policy):
    policy("mixed_float16")
    step = make(two, loss_fn=squares32)
    settle(step, two)
    with pytest.raises(NonFiniteError, match="at step 2: loss nan"):
        step(deal(two, *poisoned()))


def test_float32_has_no_loss_scale(two):
    assert make(two)._loss_scale is None


# XLA ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["local", "mirrored2"])
def test_all_settings_of_jit_agree_and_auto_chooses(comms, backend):
    comm = comms[backend]
    steps = {
        jit: make(comm, accumulate=2, jit=jit, optimizer=lambda: keras.optimizers.SGD(0.01))
        for jit in (True, False, "auto")
    }
    before = weights(steps[False].model)
    for _ in range(9):
        for step in steps.values():
            step(deal(comm))
    assert [steps[jit]._jit.choice for jit in (True, False)] == ["xla", "graph"]
    assert steps["auto"]._jit.choice in ("xla", "graph")
    for jit in (True, "auto"):
        assert relative_error(weights(steps[jit].model), before, weights(steps[False].model)) <= 1e-6


def not_for_xla(model, batch):
    _, index = tf.unique(tf.reshape(batch[1], [-1]))
    chosen = tf.reshape(tf.where(index >= 0), [-1])
    strange = tf.numpy_function(lambda x: x, [tf.gather(squares(model, batch), chosen)], tf.float32)
    return tf.ensure_shape(strange, [None]) * 0 + squares(model, batch)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("backend", ["local", "mirrored2"])
def test_auto_does_without_xla_where_it_cannot_compile(comms, backend, accumulate, caplog):
    comm = comms[backend]
    auto, plain = (make(comm, loss_fn=not_for_xla, jit=jit, accumulate=accumulate) for jit in ("auto", False))
    with caplog.at_level(logging.WARNING, logger="disttrain"):
        for _ in range(8):
            out = auto(deal(comm))
            plain(deal(comm))
    lines = [r.getMessage() for r in caplog.records if "XLA cannot compile this model" in r.getMessage()]
    assert len(lines) == 1
    assert "\n" not in lines[0]
    assert auto._jit.choice == "graph"
    assert out.step == 8
    before = weights(mlp())
    assert relative_error(weights(auto.model), before, weights(plain.model)) <= 1e-6


def test_auto_keeps_the_faster(local):
    """The choice itself, with times that are made up."""

    def choice(graph, xla):
        chooser = jit_module.JitChoice("auto", True, lambda value: [value])
        for _ in range(20):
            plan = chooser.plan("shape")
            chooser.record(plan, "shape", xla if plan.tape == "xla" else graph)
        return chooser.choice

    assert choice(1.0, 0.5) == "xla"
    assert choice(0.5, 1.0) == "graph"
    assert choice(1.0, 0.99) == "graph"
    slowest = jit_module.JitChoice(
        "auto", True, lambda value: [value, [10.0, 10.0]]
    )  # another worker is slow with both
    while not slowest.choice:
        plan = slowest.plan("shape")
        slowest.record(plan, "shape", 0.1 if plan.tape == "xla" else 1.0)
    assert slowest.choice == "graph"


def test_auto_is_agreed_after_the_same_step_whatever_the_shapes():
    """A worker whose batches change their shape, or that XLA fails, comes to the exchange with the others."""

    def steps_until_agreed(shape_of, fails=False):
        asked = []
        chooser = jit_module.JitChoice("auto", True, lambda value: asked.append(value) or [value])
        for step in range(1, 20):
            plan = chooser.plan(shape_of(step))
            if fails and plan.tape == "xla":
                assert chooser.give_up(plan, RuntimeError("XLA cannot"))
                plan = chooser.plan(shape_of(step))
                assert plan.tape == "graph"
            chooser.record(plan, shape_of(step), 1.0)
            if asked:
                return step
        return None

    usual = steps_until_agreed(lambda step: "same")
    assert usual == steps_until_agreed(lambda step: step)
    assert usual == steps_until_agreed(lambda step: step % 2)
    assert usual == steps_until_agreed(lambda step: "same", fails=True)


# Tracing --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_epoch_with_a_ragged_last_batch_is_traced_once(comms, backend, accumulate):
    comm, calls = comms[backend], []

    def counted(model, batch):
        calls.append(comm.replica_id())
        return squares(model, batch)

    step = make(comm, loss_fn=counted, accumulate=accumulate)
    dataset = tf.data.Dataset.from_tensor_slices((X, Y)).batch(5)  # 5, 5, 2: on three replicas 2 2 1 and 1 1 0
    for _ in range(2):
        for batch in comm.distribute(dataset):
            step(batch)
    assert step.optimizer.iterations.numpy() == 6
    assert comm.size <= len(calls) <= 2 * comm.size


def test_sequences_of_many_lengths_are_traced_twice_at_most(two):
    calls = []

    def loss_fn(model, batch):
        calls.append(1)
        return tf.square(tf.reduce_sum(model(batch[0]), (1, 2)))

    def build():
        return fill(keras.Sequential([keras.Input((None, 4)), LAYERS.Dense(2)]))

    step = make(two, build, loss_fn=loss_fn, optimizer=lambda: keras.optimizers.SGD(1e-5))
    for length in (3, 5, 4, 9, 7):
        step((np.ones((6, length, 4), "float32"),))
    assert len(calls) <= 2 * two.size * 2


# Dropout --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_masks_differ_everywhere(comms, backend, jit):
    """Each metric is a number made of one example's mask: of replica, micro-batch and step."""
    comm = comms[backend]
    powers = tf.constant(2.0 ** np.arange(20), tf.float32)
    count = 2 * comm.size  # examples: two micro-batches of one on each replica

    def build():
        return keras.Sequential([keras.Input((20,)), LAYERS.Dropout(0.5, seed=1), LAYERS.Dense(1)])

    def loss_fn(model, batch):
        x, number = batch
        kept = tf.cast(model.layers[0](x, training=True) > 0, tf.float32)
        codes = tf.reduce_sum(kept * powers, -1)
        one = tf.constant(1.0)
        metrics = {f"{i}": (tf.reduce_sum(tf.where(number == i, codes, 0.0)), one / count) for i in range(count)}
        losses = tf.square(model.layers[1](x))[:, 0]
        return dt.Loss(tf.reduce_sum(losses), tf.cast(tf.size(losses), tf.float32), metrics)

    step = make(comm, build, loss_fn=loss_fn, accumulate=2, jit=jit)
    batch = (np.ones((count, 20), "float32"), np.arange(count))
    codes = [float(value) for _ in range(3) for value in step(batch).metrics.values()]
    assert len(set(codes)) == len(codes) == 3 * count
    assert_replicas_equal(comm, step.model.variables)


# Batches --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("examples", [1, 2, 3, 11])
@pytest.mark.parametrize("backend", BACKENDS)
def test_plain_batches_are_shared_out(comms, backend, examples):
    comm, sizes = comms[backend], []
    step, dealt = make(comm), make(comm)
    out = step((X[:examples], Y[:examples]))
    assert out.weight == examples
    (batch,) = comm.distribute([(X[:examples], Y[:examples])])
    sizes = [len(x) for x, _ in comm.local_values(batch)]
    assert sum(sizes) == examples
    assert max(sizes) - min(sizes) <= 1
    dealt(batch)
    assert state(step) == state(dealt)


def test_inputs_may_be_any_nest(two):
    def loss_fn(model, batch):
        return tf.square(model(batch["in"]["x"]) - batch["y"])[:, 0]

    step, tuples = make(two, loss_fn=loss_fn), make(two)
    step({"in": {"x": X}, "y": Y})
    tuples((X, Y))
    assert state(step) == state(tuples)
