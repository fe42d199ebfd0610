"""The update of every backend, split, accumulation, clipping and optimizer is that of one device on the whole batch.

The problem is well conditioned on purpose: inputs and hidden activations are positive and the target is far above the
output, so the terms that a gradient element sums have one sign and do not cancel. Where they cancel to almost nothing,
Adam's division by |g| enlarges float32 rounding in any order of summation, a single device's included.
"""

import functools
import itertools

import keras
import numpy as np
import pytest
import reference
from helpers import assert_replicas_equal, relative_error, share, weights

import disttrain as dt

STEPS = 20
SPLITS = {
    "local": {"even": [30], "ragged": [29]},
    "mirrored2": {"even": [15, 15], "ragged": [20, 9], "empty": [0, 29]},
    "mirrored3": {"even": [10, 10, 10], "ragged": [17, 2, 10], "empty": [13, 0, 16]},
}
CASES = [(backend, split) for backend, splits in SPLITS.items() for split in splits]
CLIPS = ["none", "value", "norm", "global_norm"]
LIMITS = {"none": None, "value": 2.0, "norm": 4.0, "global_norm": 5.0}
TRANSFORMS = {
    "value": dt.transforms.clip_by_value,
    "norm": dt.transforms.clip_by_norm,
    "global_norm": dt.transforms.clip_by_global_norm,
}
OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(0.01, momentum=0.9),
    "adam": lambda: keras.optimizers.Adam(0.1),
    "adamw": lambda: keras.optimizers.AdamW(
        keras.optimizers.schedules.CosineDecay(0.02, 25, warmup_target=0.1, warmup_steps=5), weight_decay=0.05
    ),
}


def build():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(6, "sigmoid"), keras.layers.Dense(1)])
    rng = np.random.default_rng(3)
    model.set_weights([rng.uniform(0.05, 0.3, v.shape).astype("float32") for v in model.trainable_variables])
    return model


@functools.cache
def batches(examples):
    rng = np.random.default_rng(examples)
    x = rng.uniform(0.1, 1, (STEPS, examples, 4)).astype("float32")
    return list(zip(x, (20 + 5 * x.mean(-1)).astype("float32"), strict=True))


def mean_loss(model, batch):
    x, y = batch
    return keras.ops.mean(keras.ops.square(model(x, training=True)[:, 0] - y))


def losses(model, batch):
    x, y = batch
    return keras.ops.square(model(x, training=True)[:, 0] - y)


@functools.cache
def expected(clip, optimizer, examples):
    """Weights before training, after one step and after all."""
    model = build()
    run = reference.train(model, OPTIMIZERS[optimizer](), mean_loss, batches(examples), clip, LIMITS[clip])
    before, first, *_, last = run
    return before, first, last


def train(comm, sizes, optimizer, steps=STEPS, **options):
    """Trains and returns the model's weights before, after one step and after all, the model and the optimizer."""
    with comm.scope():
        model, opt = build(), OPTIMIZERS[optimizer]()
    step = dt.TrainStep(model, opt, loss_fn=losses, comm=comm, **options)
    seen = [weights(model)]
    for index, batch in enumerate(batches(sum(sizes))[:steps]):
        out = step(share(comm, batch, np.roll(sizes, index)))  # the small and the empty share go round
        assert out.applied
        assert out.step == index + 1
        seen.append(weights(model))
    return seen[0], seen[1], seen[-1], model, opt


def check(comm, backend, split, accumulate, clip, optimizer, jit):
    sizes = SPLITS[backend][split]
    after_reduce = [] if clip == "none" else [TRANSFORMS[clip](LIMITS[clip])]
    before, first, last, model, opt = train(
        comm, sizes, optimizer, accumulate=accumulate, after_reduce=after_reduce, jit=jit
    )
    before_ref, first_ref, last_ref = expected(clip, optimizer, sum(sizes))
    assert [w.tobytes() for w in before] == [w.tobytes() for w in before_ref]
    assert relative_error(first, before, first_ref) <= 1e-6
    assert relative_error(last, before, last_ref) <= 1e-5
    assert_replicas_equal(comm, [*model.variables, *opt.variables])
    assert opt.iterations.numpy() == STEPS


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("accumulate", [1, 2, 5])
@pytest.mark.parametrize(("backend", "split"), CASES)
def test_update_is_that_of_one_device(comms, backend, split, accumulate, clip, optimizer):
    check(comms[backend], backend, split, accumulate, clip, optimizer, jit=False)


# Every value of every axis, each with some of the others.
DIAGONAL = list(zip(CASES, itertools.cycle([1, 2, 5]), itertools.cycle(CLIPS), itertools.cycle(OPTIMIZERS)))


@pytest.mark.parametrize(("case", "accumulate", "clip", "optimizer"), DIAGONAL)
def test_update_under_xla_is_that_of_one_device(comms, case, accumulate, clip, optimizer):
    check(comms[case[0]], *case, accumulate, clip, optimizer, jit=True)


@pytest.mark.parametrize("clip", ["value", "norm", "global_norm"])
def test_clip_limits_bite(clip):
    before, first, _ = expected("none", "sgd", 29)
    assert relative_error(expected(clip, "sgd", 29)[1], before, first) > 0.1


@pytest.mark.parametrize("clip", ["value", "norm", "global_norm"])
def test_the_measure_notices_clipping_in_the_wrong_place(two, clip):
    limit = TRANSFORMS[clip](LIMITS[clip] * 0.9)
    before, first, *_ = train(two, [20, 9], "sgd", steps=1, jit=False, before_reduce=[limit])
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
