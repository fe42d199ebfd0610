"""The cases: the same data and model, trained by a peer and by disttrain, against a plain loop on a single device.

The measure is the error of the update, ||dw - dw_ref|| / ||dw_ref||, dw being what the weights have moved by.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import keras
import numpy as np
import tensorflow as tf

import disttrain as dt
from disttrain.comm import Communicator
from disttrain.lesson import peers
from disttrain.lesson.case import NOT_INSTALLED, Case, Outcome, build_model, weights_of

CASES = (
    Case(
        "plain",
        "`fit`, two replicas",
        "plain SGD",
        "Nothing goes wrong: every replica's mean counts one half, and the halves of the batch are equal.",
        peers.fit_on_two,
        expected="right",
    ),
    Case(
        "global_clipnorm",
        "`fit`, two replicas",
        "`global_clipnorm=0.1`",
        "`apply_gradients` clips before it sums over the replicas: each replica's own gradient is held against the "
        "limit, and the average never is.",
        peers.fit_on_two,
        clip="global_clipnorm",
        limit=0.1,
        learning_rate=10.0,
    ),
    Case(
        "clipvalue",
        "`fit`, two replicas",
        "`clipvalue=0.05`",
        "The same, element by element: what the replicas' gradients would have cancelled is cut off before they meet.",
        peers.fit_on_two,
        clip="clipvalue",
        limit=0.05,
        learning_rate=10.0,
    ),
    Case(
        "accumulation",
        "`fit`, two replicas",
        "`gradient_accumulation_steps=2`",
        "Keras chooses between adding up and updating in a `cond`, and both need all replicas at once (`merge_call`), "
        "which TensorFlow forbids in there.",
        peers.fit_on_two,
        expected="raises",
        accumulate=2,
        fit_batch=16,
    ),
    Case(
        "ragged",
        "`fit`, two replicas",
        "a batch of 29",
        "Before its first step `fit` averages the replicas' inputs, only to learn their shapes; 15 examples cannot be "
        "added to 14.",
        peers.fit_on_two,
        expected="raises",
        sizes=(29,),
    ),
    Case(
        "ragged_last",
        "`fit`, two replicas",
        "a batch of 32, then a last one of 5",
        "It runs, but both replicas' means count one half, whether of 3 examples or of 2. Nothing is said.",
        peers.fit_on_two,
        sizes=(32, 5),
    ),
    Case(
        "sample_weights",
        "`fit`, two replicas",
        "weighted mean, 12 of 32 weights zero",
        "Each replica divides by its own sum of weights; then a mean of 4 examples counts as much as one of 16. "
        "On one device the same loss is right.",
        peers.fit_on_two,
        weights=True,
    ),
    Case(
        "uneven_accumulation",
        "`fit`, one device",
        "accumulation over 16 and 13 examples",
        "A mean of means: each micro-batch counts one half, so that each of the 13 examples counts for more than "
        "each of the 16.",
        peers.fit_on_one,
        sizes=(29,),
        accumulate=2,
        fit_batch=16,
    ),
    Case(
        "minimize",
        "own loop, two replicas",
        "`minimize(optimizer, loss, variables)`",
        "Out of sight, `apply_gradients` sums the replicas' gradients. Each is that of a mean over its half, so the "
        "update is twice what it should be.",
        peers.minimize_on_two,
    ),
    Case(
        "reduced_twice",
        "own loop, two replicas",
        "`all_reduce(MEAN)`, then `apply_gradients`",
        "The gradients are averaged already; Keras cannot know, and sums the two equal copies: twice the update again.",
        peers.reduce_then_apply_on_two,
    ),
    Case(
        "horovod",
        "Horovod, two ranks",
        "`DistributedOptimizer(...).apply_gradients`",
        "The wrapper reduces in methods that Keras 3 never calls: each rank applies its own gradient, the ranks drift "
        "apart, and nothing is said.",
        peers.horovod_on_two,
    ),
)


def run_cases(cases: Sequence[Case] = CASES) -> Iterator[Outcome]:
    """Runs one case after the other. Call it before anything else uses TensorFlow.

    Raises:
      BackendError: TensorFlow has already started with fewer than two logical devices.
    """
    comm = dt.init("mirrored", replicas=2)
    for case in cases:
        reference = single_device_update(case)
        peer_error = failure = message = None
        try:
            peer_error = _error(case.peer(case), reference)
        except peers.NotInstalledError as missing:
            failure, message = NOT_INSTALLED, str(missing)
        except Exception as error:  # whatever a peer raises is its result
            failure, message = type(error).__name__, _first_line(error)
        yield Outcome(case, peer_error, failure, message, _error(disttrain_update(case, comm), reference))


def single_device_update(case: Case) -> np.ndarray:
    """The update that everything is measured against: one device that sees each batch as a whole, and no optimizer."""
    model = build_model()
    variables, before = [v.value for v in model.trainable_variables], weights_of(model)
    for inputs, labels, *weights in case.batches():
        weight = tf.constant(weights[0] if weights else np.ones(len(inputs), "float32"))
        with tf.GradientTape() as tape:
            losses = tf.square(model(inputs) - labels)[:, 0]
            loss = tf.reduce_sum(weight * losses) / tf.reduce_sum(weight)
        gradients = tape.gradient(loss, variables)
        if case.clip == "global_clipnorm":
            gradients, _ = tf.clip_by_global_norm(gradients, case.limit)
        elif case.clip == "clipvalue":
            gradients = [tf.clip_by_value(g, -case.limit, case.limit) for g in gradients]
        for variable, gradient in zip(variables, gradients, strict=True):
            variable.assign_sub(case.learning_rate * gradient)
    return weights_of(model) - before


def disttrain_update(case: Case, comm: Communicator) -> np.ndarray:
    """The same through `TrainStep`."""
    clips = {"global_clipnorm": dt.transforms.clip_by_global_norm, "clipvalue": dt.transforms.clip_by_value}
    with comm.scope():
        model, optimizer = build_model(), keras.optimizers.SGD(case.learning_rate)
    before = weights_of(model)
    step = dt.TrainStep(
        model,
        optimizer,
        loss_fn=dt.losses.mean_squared_error(),
        comm=comm,
        accumulate=case.accumulate,
        after_reduce=[clips[case.clip](case.limit)] if case.clip else [],
    )
    for batch in comm.distribute(case.batches()):
        step(batch)
    return weights_of(model) - before


def _error(updates: np.ndarray, reference: np.ndarray) -> float:
    """The error of the update; of the worst rank where there are several."""
    norms = np.linalg.norm(np.atleast_2d(updates) - reference, axis=1)
    return float(norms.max() / np.linalg.norm(reference))


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), "")
