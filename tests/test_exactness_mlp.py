"""The update of every backend, split, accumulation, clipping and optimizer is that of one device on the whole batch.

Here the backends of one process; `test_exactness_processes` has the others.
"""

import itertools

import keras
import numpy as np
import pytest
import reference
from helpers import assert_replicas_equal, relative_error, share, weights
from problem import (
    CLIPS,
    LIMITS,
    OPTIMIZERS,
    SPLITS,
    STEPS,
    TRANSFORMS,
    Training,
    batches,
    build,
    clipping,
    expected,
    losses,
    mean_loss,
)

import disttrain as dt

BACKENDS = {"local": 1, "mirrored2": 2, "mirrored3": 3}


def check(comm, accumulate, clip, optimizer, jit, splits=None):
    training = Training(comm, optimizer, accumulate=accumulate, after_reduce=clipping(clip), jit=jit)
    for split in splits or SPLITS[comm.size]:
        sizes = SPLITS[comm.size][split]
        batch = batches(sum(sizes))
        # The small and the empty share go round.
        before, first, last = training.run(lambda i, s=sizes, b=batch: share(comm, b[i], np.roll(s, i)))
        before_ref, first_ref, last_ref = expected(clip, optimizer, sum(sizes))
        assert [w.tobytes() for w in before] == [w.tobytes() for w in before_ref], split
        assert relative_error(first, before, first_ref) <= 1e-6, split
        assert relative_error(last, before, last_ref) <= 1e-5, split
        assert_replicas_equal(comm, [*training.model.variables, *training.optimizer.variables])
        assert training.optimizer.iterations.numpy() == STEPS


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("accumulate", [1, 2, 5])
@pytest.mark.parametrize("backend", BACKENDS)
def test_update_is_that_of_one_device(comms, backend, accumulate, clip, optimizer):
    check(comms[backend], accumulate, clip, optimizer, jit=False)


# Every value of every axis, each with some of the others.
CASES = [(backend, split) for backend, size in BACKENDS.items() for split in SPLITS[size]]
DIAGONAL = list(zip(CASES, itertools.cycle([1, 2, 5]), itertools.cycle(CLIPS), itertools.cycle(OPTIMIZERS)))


@pytest.mark.parametrize(("case", "accumulate", "clip", "optimizer"), DIAGONAL)
def test_update_under_xla_is_that_of_one_device(comms, case, accumulate, clip, optimizer):
    backend, split = case
    check(comms[backend], accumulate, clip, optimizer, jit=True, splits=[split])


@pytest.mark.parametrize("clip", ["value", "norm", "global_norm"])
def test_clip_limits_bite(clip):
    before, first, _ = expected("none", "sgd", 29)
    assert relative_error(expected(clip, "sgd", 29)[1], before, first) > 0.1


@pytest.mark.parametrize("clip", ["value", "norm", "global_norm"])
def test_the_measure_notices_clipping_in_the_wrong_place(two, clip):
    limit = TRANSFORMS[clip](LIMITS[clip] * 0.9)
    training = Training(two, "sgd", jit=False, before_reduce=[limit])
    before, first, _ = training.run(lambda i: share(two, batches(29)[i], [20, 9]), steps=1)
    assert relative_error(first, before, expected(clip, "sgd", 29)[1]) > 0.01


def test_the_measure_notices_a_mean_of_means(two):
    def unequal(model, batch):
        loss = losses(model, batch)
        return dt.Loss(keras.ops.mean(loss) * 2, 2.0)

    with two.scope():
        model, optimizer = build(), OPTIMIZERS["sgd"]()
    before = weights(model)
    x, y = batches(29)[0]
    batch = (x, np.where(np.arange(29) < 20, y, 3 * y))
    dt.TrainStep(model, optimizer, loss_fn=unequal, comm=two, jit=False)(share(two, batch, [20, 9]))
    _, first_ref = reference.train(build(), OPTIMIZERS["sgd"](), mean_loss, [batch])
    assert relative_error(weights(model), before, first_ref) > 0.01
