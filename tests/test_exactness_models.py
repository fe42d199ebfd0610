"""Exactness beyond an MLP: synchronized BatchNormalization, embeddings, masks, sample weights, several losses.

Every test compares with `reference.train`, which sees the whole batch on one device.
"""

import keras
import numpy as np
import pytest
import reference
import tensorflow as tf
from helpers import assert_replicas_equal, relative_error, share, weights

import disttrain as dt
from disttrain.gradients import sparse

LAYERS = keras.layers


def randomize(model, seed=0):
    """The same weights for every model of one architecture."""
    rng = np.random.default_rng(seed)
    for v in model.trainable_variables:
        v.assign(rng.uniform(0.05, 0.4, v.shape).astype("float32"))
    return model


def compare(comm, sizes, build, optimizer, loss_fn, mean_loss, batches, *, limit=None, **options):
    """Trains both ways on `batches`, checks the first and the last update, and returns the models and last output."""
    with comm.scope():
        model, opt = build(), optimizer()
    clip = [dt.transforms.clip_by_global_norm(limit)] if limit else []
    step = dt.TrainStep(model, opt, loss_fn=loss_fn, comm=comm, after_reduce=clip, **{"jit": False, **options})
    model_ref = build()
    wanted = reference.train(model_ref, optimizer(), mean_loss, batches, "global_norm" if limit else "none", limit)
    before = next(wanted)
    for index, (batch, after_ref) in enumerate(zip(batches, wanted, strict=True)):
        out = step(share(comm, batch, np.roll(sizes, index)))
        assert out.applied
        assert relative_error(weights(model), before, after_ref) <= (1e-6 if index == 0 else 1e-5)
    assert_replicas_equal(comm, [*model.variables, *opt.variables])
    return model, model_ref, out


def token_batches(steps, examples=11, length=6, vocabulary=9):
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, vocabulary, (steps, examples, length + 1)).astype("int32")
    return [(t[:, :-1], t[:, 1:]) for t in tokens]


# BatchNormalization ---------------------------------------------------------------------------------------------------


def image_batches(steps, examples):
    rng = np.random.default_rng(7)
    x = rng.uniform(0, 1, (steps, examples, 8, 8, 1)).astype("float32")
    return list(zip(x, (10 + x.mean((2, 3, 4))).astype("float32"), strict=True))


def cnn():
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            LAYERS.Conv2D(4, 3, use_bias=False),
            LAYERS.BatchNormalization(synchronized=True, momentum=0.8),
            LAYERS.Activation("sigmoid"),
            LAYERS.GlobalAveragePooling2D(),
            LAYERS.Dense(1),
        ]
    )
    return randomize(model)


def squares(model, batch):
    return keras.ops.square(model(batch[0], training=True)[:, 0] - batch[1])


def mean_squares(model, batch):
    return tf.reduce_mean(squares(model, batch))


@pytest.mark.parametrize(
    ("backend", "sizes"),
    [
        ("local", [13]),
        ("mirrored2", [9, 4]),
        ("mirrored3", [5, 4, 4]),
        ("mirrored3", [7, 2, 4]),
        ("mirrored3", [9, 0, 4]),
    ],
)
def test_synchronized_batch_normalization(comms, backend, sizes):
    comm = comms[backend]
    batches = image_batches(5, 13)
    model, model_ref, _ = compare(
        comm, sizes, cnn, lambda: keras.optimizers.SGD(0.01, momentum=0.9), squares, mean_squares, batches
    )
    for moving, moving_ref in zip(model.non_trainable_variables, model_ref.non_trainable_variables, strict=True):
        np.testing.assert_allclose(moving.numpy(), moving_ref.numpy(), rtol=1e-5)


@pytest.mark.parametrize("accumulate", [2, 3])
def test_batch_normalization_normalizes_each_micro_batch_over_all_replicas(three, accumulate):
    """With micro-batches, a layer sees the i-th of every replica together; the reference does the same one by one."""
    sizes, (batch,) = np.array([6, 3, 0]), image_batches(1, 9)
    with three.scope():
        model, optimizer = cnn(), keras.optimizers.SGD(0.1)
    before = weights(model)
    step = dt.TrainStep(model, optimizer, loss_fn=squares, comm=three, accumulate=accumulate, jit=False)
    step(share(three, batch, sizes))

    model_ref, total = cnn(), [0.0] * len(before)
    size = -(-sizes // accumulate)
    for index in range(accumulate):
        rows = [
            np.arange(start + min(index * s, n), start + min((index + 1) * s, n))
            for start, n, s in zip(np.cumsum(sizes) - sizes, sizes, size, strict=True)
        ]
        piece = tuple(x[np.concatenate(rows)] for x in batch)
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(squares(model_ref, piece)) / 9
        total = [a + b for a, b in zip(total, tape.gradient(loss, model_ref.trainable_weights), strict=True)]
    keras.optimizers.SGD(0.1).apply_gradients(zip(total, model_ref.trainable_variables, strict=True))
    assert relative_error(weights(model), before, weights(model_ref)) <= 1e-6
    assert_replicas_equal(three, model.variables)
    for moving, moving_ref in zip(model.non_trainable_variables, model_ref.non_trainable_variables, strict=True):
        np.testing.assert_allclose(moving.numpy(), moving_ref.numpy(), rtol=1e-6)


@pytest.mark.parametrize("sizes", [(7, 0, 5)])
@pytest.mark.parametrize("jit", [False, True])
def test_moving_statistics_without_synchronization_are_equal_on_all_replicas(three, jit, sizes):
    """Each replica normalizes by its own moments; the moving ones are their average by number of examples."""

    def build():
        return randomize(
            keras.Sequential([keras.Input((2,)), LAYERS.BatchNormalization(momentum=0.5), LAYERS.Dense(1)])
        )

    with three.scope():
        model, optimizer = build(), keras.optimizers.SGD(0.01)
    x = np.random.default_rng(0).uniform(1, 2, (12, 2)).astype("float32")
    y = x.sum(1)
    dt.TrainStep(model, optimizer, loss_fn=squares, comm=three, jit=jit)(share(three, (x, y), sizes))
    assert_replicas_equal(three, model.variables)
    mean, variance = (v.numpy() for v in model.non_trainable_variables)
    np.testing.assert_allclose(mean, 0.5 * x.mean(0), rtol=1e-6)
    parts = np.split(x, np.cumsum(sizes)[:-1])
    moments = sum(len(part) * part.var(0) for part in parts if len(part)) / 12
    np.testing.assert_allclose(variance, 0.5 + 0.5 * moments, rtol=1e-6)


# Embeddings -----------------------------------------------------------------------------------------------------------


def embedder():
    return randomize(
        keras.Sequential([keras.Input((6,), dtype="int32"), LAYERS.Embedding(9, 4), LAYERS.Flatten(), LAYERS.Dense(1)])
    )


def first_squares(model, batch):
    return keras.ops.square(model(batch[0], training=True)[:, 0] - 20.0)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize(("backend", "sizes"), [("local", [11]), ("mirrored2", [8, 3]), ("mirrored3", [8, 0, 3])])
def test_embedding_with_repeated_ids(comms, backend, sizes, jit):
    compare(
        comms[backend],
        sizes,
        embedder,
        lambda: keras.optimizers.Adam(0.05),
        first_squares,
        lambda model, batch: tf.reduce_mean(first_squares(model, batch)),
        token_batches(10),
        limit=2.0,
        accumulate=2,
        jit=jit,
    )


@keras.saving.register_keras_serializable("tests")
class Tied(keras.Model):
    """A language model whose embedding is its output projection as well."""

    def __init__(self):
        super().__init__()
        self.embed = LAYERS.Embedding(9, 4)
        self.mix = LAYERS.Dense(4, "sigmoid")

    def call(self, tokens, training=False):
        hidden = self.mix(self.embed(tokens))
        return hidden @ keras.ops.transpose(self.embed.embeddings)


def tied():
    model = Tied()
    model(np.zeros((1, 6), "int32"))
    return randomize(model)


def mean_crossentropy(model, batch):
    logits = model(batch[0], training=True)
    return tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(batch[1], logits))


@pytest.mark.parametrize(("backend", "sizes"), [("local", [11]), ("mirrored3", [2, 0, 9])])
def test_tied_weights(comms, backend, sizes):
    compare(
        comms[backend],
        sizes,
        tied,
        lambda: keras.optimizers.SGD(2.0, momentum=0.9),
        dt.losses.sparse_categorical_crossentropy(),
        mean_crossentropy,
        token_batches(10),
        limit=0.05,
        accumulate=2,
    )


# Masks and weights ----------------------------------------------------------------------------------------------------


def masked_model():
    return randomize(
        keras.Sequential(
            [
                keras.Input((6,), dtype="int32"),
                LAYERS.Embedding(9, 4, mask_zero=True),
                LAYERS.Dense(5, "sigmoid"),
                LAYERS.Dense(9),
            ]
        )
    )


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize(("backend", "sizes"), [("local", [11]), ("mirrored2", [2, 9]), ("mirrored3", [4, 0, 7])])
def test_masked_tokens_count_nothing(comms, backend, sizes, jit):
    batches = token_batches(4)
    for tokens, labels in batches:
        tokens[2:5, 3:] = 0  # padding, more of it at one end of the batch
        labels[:2, 1:] = -1

    def mean_loss(model, batch):
        tokens, labels = batch
        kept = (labels >= 0) & (tokens != 0)
        logits = tf.boolean_mask(tf.convert_to_tensor(model(tokens)), kept)
        return tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels[kept], logits))

    *_, out = compare(
        comms[backend],
        sizes,
        masked_model,
        lambda: keras.optimizers.SGD(0.5),
        dt.losses.sparse_categorical_crossentropy(ignore=-1),
        mean_loss,
        batches,
        accumulate=2,
        jit=jit,
    )
    tokens, labels = batches[-1]
    assert float(out.weight) == np.sum((labels >= 0) & (tokens != 0))


def mlp():
    return randomize(keras.Sequential([keras.Input((4,)), LAYERS.Dense(6, "sigmoid"), LAYERS.Dense(3)]))


def vectors(steps, examples=13):
    rng = np.random.default_rng(2)
    return rng.uniform(0.1, 1, (steps, examples, 4)).astype("float32")


@pytest.mark.parametrize(("backend", "sizes"), [("local", [13]), ("mirrored2", [11, 2]), ("mirrored3", [1, 3, 9])])
def test_sample_weights(comms, backend, sizes):
    sample_weight = np.geomspace(0.01, 30, 13).astype("float32")  # nearly all of it on the last replica
    sample_weight[4] = 0
    batches = [(x, (10 + x[:, :3]).astype("float32"), sample_weight) for x in vectors(6)]

    def mean_loss(model, batch):
        x, y, w = batch
        return tf.reduce_sum(tf.reduce_mean(tf.square(model(x) - y), -1) * w) / tf.reduce_sum(w)

    *_, out = compare(
        comms[backend],
        sizes,
        mlp,
        lambda: keras.optimizers.SGD(0.01, momentum=0.9),
        dt.losses.mean_squared_error(),
        mean_loss,
        batches,
        accumulate=2,
    )
    np.testing.assert_allclose(out.weight, sample_weight.sum(), rtol=1e-6)


def test_kernel_regularizer_counts_once(three):
    def build():
        regularizer = keras.regularizers.L2(0.1)
        layers = [keras.Input((4,)), LAYERS.Dense(6, "sigmoid", kernel_regularizer=regularizer), LAYERS.Dense(3)]
        return randomize(keras.Sequential(layers))

    def mean_loss(model, batch):
        x, y = batch
        return tf.reduce_mean(tf.square(model(x) - y)) + 0.1 * tf.reduce_sum(tf.square(model.weights[0].value))

    batches = [(x, (10 + x[:, :3]).astype("float32")) for x in vectors(6)]
    compare(
        three, [1, 8, 4], build, lambda: keras.optimizers.SGD(0.02), dt.losses.mean_squared_error(), mean_loss, batches,
        accumulate=3,
    )  # fmt: skip


# Several losses, and the metrics --------------------------------------------------------------------------------------


def two_heads():
    inputs = keras.Input((4,))
    hidden = LAYERS.Dense(6, "sigmoid")(inputs)
    return randomize(keras.Model(inputs, [LAYERS.Dense(1)(hidden), LAYERS.Dense(3)(hidden)]))


def joint_loss(model, batch):
    x, value, label = batch
    predicted, logits = model(x, training=True)
    regression = tf.square(predicted[:, 0] - value)
    classification = tf.nn.sparse_softmax_cross_entropy_with_logits(label, logits)
    count = tf.cast(tf.size(label), tf.float32)
    return dt.Loss(
        tf.reduce_sum(regression + 0.3 * classification),
        count,
        {
            "mse": (tf.reduce_sum(regression), count),
            "accuracy": (
                tf.reduce_sum(tf.cast(tf.argmax(logits, -1, tf.int32) == label, tf.float32)),
                count,
            ),
            "mean_of_label_1": (
                tf.reduce_sum(value * tf.cast(label == 1, tf.float32)),
                tf.math.count_nonzero(label == 1),
            ),
        },
    )


def mean_joint_loss(model, batch):
    x, value, label = batch
    predicted, logits = model(x, training=True)
    classification = tf.nn.sparse_softmax_cross_entropy_with_logits(label, logits)
    return tf.reduce_mean(tf.square(predicted[:, 0] - value)) + 0.3 * tf.reduce_mean(classification)


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize(("backend", "sizes"), [("local", [13]), ("mirrored3", [9, 0, 4])])
def test_several_losses_and_their_metrics(comms, backend, sizes, accumulate):
    labels = np.random.default_rng(4).integers(0, 3, 13).astype("int32")
    batches = [(x, (10 + x.sum(1)).astype("float32"), labels) for x in vectors(4)]
    *_, out = compare(
        comms[backend],
        sizes,
        two_heads,
        lambda: keras.optimizers.SGD(0.01),
        joint_loss,
        mean_joint_loss,
        batches,
        accumulate=accumulate,
    )
    last = randomize(two_heads())
    *_, _ = reference.train(last, keras.optimizers.SGD(0.01), mean_joint_loss, batches[:-1])
    x, value, _ = batches[-1]
    predicted, logits = (np.array(o) for o in last(x))
    np.testing.assert_allclose(out.metrics["mse"], np.mean((predicted[:, 0] - value) ** 2), rtol=1e-5)
    np.testing.assert_allclose(out.metrics["accuracy"], np.mean(logits.argmax(-1) == labels), rtol=1e-6)
    np.testing.assert_allclose(out.metrics["mean_of_label_1"], value[labels == 1].mean(), rtol=1e-6)
    np.testing.assert_allclose(out.loss, mean_joint_loss(last, batches[-1]), rtol=1e-5)
    assert set(out.metrics) == {"mse", "accuracy", "mean_of_label_1"}


@pytest.mark.parametrize("accumulate", [1, 3])
def test_loss_norm_and_accuracy_are_those_of_the_whole_batch(three, accumulate):
    (x,) = vectors(1)
    labels = np.arange(13, dtype="int32") % 3
    sample_weight = np.linspace(0, 2, 13).astype("float32")
    with three.scope():
        model, optimizer = mlp(), keras.optimizers.SGD(0.0)
    loss_fn = dt.losses.sparse_categorical_crossentropy()
    step = dt.TrainStep(model, optimizer, loss_fn=loss_fn, comm=three, accumulate=accumulate, jit=False)
    out = step(share(three, (x, labels, sample_weight), [6, 7, 0]))
    local = mlp()
    with tf.GradientTape() as tape:
        logits = local(x)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
        loss = tf.reduce_sum(losses * sample_weight) / sample_weight.sum()
    norm = tf.linalg.global_norm(tape.gradient(loss, local.trainable_weights))
    hits = np.argmax(logits, -1) == labels
    np.testing.assert_allclose(out.loss, loss, rtol=1e-6)
    np.testing.assert_allclose(out.grad_norm, norm, rtol=1e-6)
    np.testing.assert_allclose(out.metrics["accuracy"], np.average(hits, weights=sample_weight), rtol=1e-6)


# Forms of models ------------------------------------------------------------------------------------------------------


class Subclass(keras.Model):
    def __init__(self):
        super().__init__()
        self.hidden = LAYERS.Dense(6, "sigmoid", kernel_initializer=keras.initializers.RandomUniform(0.1, 0.3, seed=1))
        self.out = LAYERS.Dense(3, kernel_initializer=keras.initializers.RandomUniform(0.1, 0.3, seed=2))

    def call(self, x, training=False):
        return self.out(self.hidden(x))


def functional():
    inputs = keras.Input((4,))
    return randomize(keras.Model(inputs, LAYERS.Dense(3)(LAYERS.Dense(6, "sigmoid")(inputs))))


def unbuilt_sequential():
    initializer = keras.initializers.RandomUniform(0.1, 0.3, seed=1)
    return keras.Sequential(
        [LAYERS.Dense(6, "sigmoid", kernel_initializer=initializer), LAYERS.Dense(3, kernel_initializer=initializer)]
    )


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("form", [mlp, functional, Subclass, unbuilt_sequential])
@pytest.mark.parametrize(("backend", "sizes"), [("local", [13]), ("mirrored2", [4, 9])])
def test_forms_of_keras_models(comms, backend, sizes, form, jit):
    batches = [(x, (10 + x[:, :3]).astype("float32")) for x in vectors(4)]
    comm = comms[backend]
    with comm.scope():
        model, optimizer = form(), keras.optimizers.SGD(0.02, momentum=0.9)
    step = dt.TrainStep(model, optimizer, loss_fn=dt.losses.mean_squared_error(), comm=comm, accumulate=2, jit=jit)
    model_ref = form()
    model_ref(batches[0][0])  # the same seeds, the same first weights
    *_, last_ref = wanted = list(
        reference.train(
            model_ref,
            keras.optimizers.SGD(0.02, momentum=0.9),
            lambda m, b: tf.reduce_mean(tf.square(m(b[0]) - b[1])),
            batches,
        )
    )
    for batch in batches:
        step(share(comm, batch, sizes))
    assert relative_error(weights(model), wanted[0], last_ref) <= 1e-5
    assert_replicas_equal(comm, [*model.variables, *optimizer.variables])


class Plain(tf.Module):
    """A model of tf.Variables, without Keras."""

    def __init__(self):
        super().__init__()
        rng = np.random.default_rng(0)
        self.kernel = tf.Variable(rng.uniform(0.1, 0.4, (4, 3)).astype("float32"), name="kernel")
        self.bias = tf.Variable(np.zeros(3, "float32"), name="bias")

    def __call__(self, x, training=False):
        return tf.sigmoid(x @ self.kernel) + self.bias


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize(("backend", "sizes"), [("local", [13]), ("mirrored2", [4, 9])])
def test_plain_module_of_tf_variables(comms, backend, sizes, jit):
    comm = comms[backend]
    batches = [(x, (10 + x[:, :3]).astype("float32")) for x in vectors(4)]
    with comm.scope():
        model, optimizer = Plain(), keras.optimizers.SGD(0.05, momentum=0.9)
    step = dt.TrainStep(
        model,
        optimizer,
        loss_fn=lambda m, b: tf.reduce_mean(tf.square(m(b[0]) - b[1]), -1),
        comm=comm,
        accumulate=2,
        jit=jit,
    )
    before = weights(model)
    model_ref = Plain()
    *_, last = reference.train(
        model_ref,
        keras.optimizers.SGD(0.05, momentum=0.9),
        lambda m, b: tf.reduce_mean(tf.square(m(b[0]) - b[1])),
        batches,
        variables=model_ref.trainable_variables,
    )
    for batch in batches:
        step(share(comm, batch, sizes))
    assert relative_error(weights(model), before, last) <= 1e-5
    assert_replicas_equal(comm, model.trainable_variables)


@pytest.mark.parametrize(("backend", "sizes"), [("local", [11]), ("mirrored3", [2, 0, 9])])
def test_small_embeddings_become_dense(comms, backend, sizes, monkeypatch):
    """As outside the tests, where `SMALL` is not zero; and every batch has other tokens, but the step one trace."""
    monkeypatch.setattr(sparse, "SMALL", 1 << 20)
    calls = []
    loss_fn = dt.losses.sparse_categorical_crossentropy()

    def counted(model, batch):
        calls.append(batch)
        return loss_fn(model, batch)

    optimizer = lambda: keras.optimizers.SGD(2.0, momentum=0.9)  # noqa: E731
    options = {"limit": 0.05, "accumulate": 2}
    compare(comms[backend], sizes, tied, optimizer, counted, mean_crossentropy, token_batches(10), **options)
    assert len(calls) == len(sizes)
