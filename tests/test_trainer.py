"""The loop: epochs and steps, evaluation over uneven batches, and what it says of itself."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import disttrain as dt
from disttrain.errors import ConfigError, DataError

RNG = np.random.default_rng(0)
X = RNG.normal(size=(29, 4)).astype("float32")
Y = RNG.integers(0, 3, 29).astype("int32")


def make(comm, rate=0.1):
    with comm.scope():
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
        optimizer = keras.optimizers.SGD(rate)
    step = dt.TrainStep(model, optimizer, loss_fn=dt.losses.sparse_categorical_crossentropy(), comm=comm, jit=False)
    return dt.Trainer(step, progress=False), model


def dataset(size=8):
    return tf.data.Dataset.from_tensor_slices((X, Y)).batch(size)


@pytest.mark.parametrize("backend", ["local", "mirrored3"])
def test_evaluation_is_exact_over_batches_of_any_size(comms, backend):
    """Batches of 9, 9, 9 and 2: the last leaves one of three replicas without examples."""
    trainer, model = make(comms[backend])
    logits = X @ model.layers[-1].kernel.numpy() + model.layers[-1].bias.numpy()
    wanted = np.log(np.exp(logits).sum(1)) - logits[np.arange(29), Y]
    seen = trainer.evaluate(dataset(9))
    assert seen["loss"] == pytest.approx(wanted.mean(), rel=1e-6)
    assert seen["accuracy"] == pytest.approx((logits.argmax(1) == Y).mean(), rel=1e-6)


def test_epochs_and_steps(comms):
    trainer, _ = make(comms["mirrored2"])
    summary = trainer.fit(dataset(), epochs=3, validation=dataset())
    assert (summary["steps"], summary["epochs"], summary["examples"], summary["skipped"]) == (12, 3, 87, 0)
    assert summary["validation"]["loss"] < summary["train"]["loss"]
    summary = trainer.fit(dataset(), steps=6)
    assert (summary["steps"], summary["examples"]) == (6, 29 + 16)
    assert trainer.step.optimizer.iterations.numpy() == 18


def test_means_of_an_epoch_are_weighted_by_batch(comms):
    """With a learning rate of zero, the mean over the epoch is that of the whole data set."""
    trainer, _ = make(comms["local"], rate=0.0)
    summary = trainer.fit(dataset(), epochs=1)
    assert summary["train"] == pytest.approx(trainer.evaluate(dataset()), rel=1e-6)


def test_an_epoch_without_an_applied_step_is_no_error(local):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    loss_fn = dt.losses.sparse_categorical_crossentropy()
    step = dt.TrainStep(model, keras.optimizers.SGD(0.1), loss_fn=loss_fn, comm=local, jit=False, on_nonfinite="skip")
    summary = dt.Trainer(step, progress=False).fit([(np.full_like(X, np.nan), Y)], epochs=1)
    assert (summary["steps"], summary["skipped"], summary["train"]) == (1, 1, {})


def test_mistakes(local):
    trainer, _ = make(local)
    with pytest.raises(ConfigError, match="epochs=1 and steps=2: give one of the two"):
        trainer.fit(dataset(), epochs=1, steps=2)
    with pytest.raises(ConfigError, match="epochs=0: a whole number of 1 or more"):
        trainer.fit(dataset(), epochs=0)
    with pytest.raises(DataError, match="the data set yields no batches"):
        trainer.fit(dataset().take(0))
    with pytest.raises(DataError, match="the data set is empty or has no weight"):
        trainer.evaluate(dataset().take(0))
