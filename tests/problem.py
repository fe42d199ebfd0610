"""The small problem that every backend is measured on, and how to train it with disttrain.

It is well conditioned on purpose: inputs and hidden activations are positive and the target is far above the output, so
the terms that a gradient element sums have one sign and do not cancel. Where they cancel to almost nothing, Adam's
division by |g| enlarges float32 rounding in any order of summation, a single device's included.
"""

import functools
import itertools

import keras
import numpy as np
import reference

import disttrain as dt

STEPS = 20
EXAMPLES = 29
ACCUMULATE = [1, 2, 5]
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
# By number of replicas and name: how many of a batch's examples each replica gets.
SPLITS = {
    1: {"even": [30], "ragged": [29]},
    2: {"even": [15, 15], "ragged": [20, 9], "empty": [0, 29]},
    3: {"even": [10, 10, 10], "ragged": [17, 2, 10], "empty": [13, 0, 16]},
}


def cases():
    """(accumulate, clip, optimizer): the whole matrix."""
    return list(itertools.product(ACCUMULATE, CLIPS, OPTIMIZERS))


def cases_of_processes(ranks):
    """The whole matrix for two ranks; for three a third of it, in which any two values still come together."""
    if ranks == 2:
        return cases()
    places = itertools.product(range(len(ACCUMULATE)), range(len(CLIPS)))
    return [(ACCUMULATE[i], CLIPS[j], list(OPTIMIZERS)[(i + j) % 3]) for i, j in places]


def build():
    """The model, with the same weights every time."""
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(6, "sigmoid"), keras.layers.Dense(1)])
    rng = np.random.default_rng(3)
    model.set_weights([rng.uniform(0.05, 0.3, v.shape).astype("float32") for v in model.trainable_variables])
    return model


@functools.cache
def batches(examples):
    """Global batches, the same every time."""
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
    """Weights of a single device before training, after one step and after all."""
    run = reference.train(build(), OPTIMIZERS[optimizer](), mean_loss, batches(examples), clip, LIMITS[clip])
    before, first, *_, last = run
    return before, first, last


def clipping(clip):
    """For `after_reduce`."""
    return [] if clip == "none" else [TRANSFORMS[clip](LIMITS[clip])]


class Training:
    """One step, traced once, that can train the problem again from the start, as often as there are splits."""

    def __init__(self, comm, optimizer, **options):
        with comm.scope():
            self.model, self.optimizer = build(), OPTIMIZERS[optimizer]()
        self.step = dt.TrainStep(self.model, self.optimizer, loss_fn=losses, comm=comm, **options)
        self._start = [(v, v.numpy()) for v in (*self.model.variables, *self.optimizer.variables)]

    def run(self, shares, steps=STEPS):
        """Trains from the start and returns the trainable weights before, after one step and after all.

        Args:
          shares: (index of the step) -> what the step takes.
        """
        for variable, value in self._start:
            variable.assign(value)
        seen = [self._weights()]
        for index in range(steps):
            out = self.step(shares(index))
            assert out.applied
            assert out.step == index + 1
            seen.append(self._weights())
        return seen[0], seen[1], seen[-1]

    def _weights(self):
        return [v.numpy() for v in self.model.trainable_variables]
