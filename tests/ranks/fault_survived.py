"""Faults that training survives, or that all ranks answer with the same error: each is tried, the test judges."""

import logging
import time

import keras
import numpy as np
import tensorflow as tf
from _report import BACKEND, RANK, arrays, report  # first: it writes down the process's id
from fault_parts import COUNTS, LABELS, batch, batch_of_lookups, build, build_lookups, labels_of, lookups, losses
from helpers import copies, snapshot

import disttrain as dt
from disttrain.comm.one_replica import OneReplica
from disttrain.errors import ConfigError, DriftError, GradientError, NonFiniteError
from disttrain.gradients import sparse

sparse.SMALL = 0
# Nothing here is about XLA, whose compilations of the update would take most of the time.
OneReplica.run = lambda self, fn, args=(), fused=False: fn(*args)
comm = dt.init(BACKEND)
said, seen = {}, {}


def sgd(rate=0.01):
    return keras.optimizers.SGD(rate, momentum=0.9)


def adam():
    return keras.optimizers.Adam(0.1)


def make(model=build, optimizer=sgd, loss_fn=losses, **options):
    with comm.scope():
        model, optimizer = model(), optimizer()
    return dt.TrainStep(model, optimizer, loss_fn=loss_fn, comm=comm, **{"jit": False, **options})


def state(step, part=""):
    """The bytes of weights and optimizer state; of those alone whose path has `part` in it."""
    return snapshot(*(v for v in (*step.model.variables, *step.optimizer.variables) if part in v.path))


def keep(name, step):
    for i, v in enumerate(step.model.trainable_variables):
        seen[f"{name} {i}"] = copies(v)[0]


def error_of(error, fn, *args):
    """The message of the error that is to come."""
    start = time.monotonic()
    try:
        fn(*args)
    except error as raised:
        return str(raised), time.monotonic() - start
    return "nothing was raised", 0.0


def gradients_of_none():
    for on_none, labels in LABELS.items():
        step, untouched = make(optimizer=adam if on_none == "skip" else sgd, on_none=on_none), []
        for index in range(len(labels)):
            before = state(step, "side")
            assert step(batch(RANK, index, labels_of(on_none, RANK, index))).applied
            untouched.append(state(step, "side") == before)
            keep(f"{on_none} {index}", step)
        said[f"{on_none}: side untouched"] = untouched
        if on_none == "error":
            before = state(step)
            said["none"], _ = error_of(GradientError, step, batch(RANK, 8, "m"))
            said["none: untouched"] = state(step) == before
            said["none: goes on"] = step(batch(RANK, 9)).applied


def joined_ranks_reach_nothing():
    """Rank 0 has labels of both outputs, but no batches after the first."""
    step = make(on_none="skip")
    step(batch(RANK, 0))
    before = state(step, "side")
    if RANK:
        step(batch(RANK, 1, "m"))
    step.join()
    said["joined: side untouched"] = state(step, "side") == before


def whole_table():
    step = make(build_lookups, loss_fn=lookups)
    for index in range(4):
        step(batch_of_lookups(RANK, index))
    step.join()
    keep("lookups", step)


def not_finite():
    broken = batch(RANK, 1)
    if RANK == 1:
        broken["x"] *= np.nan
    for choice in ("skip", "raise"):
        step = make(on_nonfinite=choice)
        step(batch(RANK, 0))
        before = state(step)
        if choice == "skip":
            said["nan: applied"] = step(broken).applied
        else:
            said["nan"], _ = error_of(NonFiniteError, step, broken)
        said[f"nan {choice}: untouched"] = state(step) == before
        out = step(batch(RANK, 2))
        said[f"nan {choice}: goes on"] = [out.applied, out.step]


def disagreements():
    odd = RANK == 1
    clip = dt.transforms.clip_by_global_norm(2.0 if odd else 1.0)

    def frozen():
        model = build()
        model.get_layer("body").trainable = not odd
        return model

    def larger():
        model = build()
        return keras.Model(model.inputs, [*model.outputs, keras.layers.Dense(2, name="extra")(model.outputs[0])])

    differing = {
        "width": lambda: make(lambda: build(width=6 if odd else 5)),
        "variables": lambda: make(larger if odd else build, loss_fn=lambda m, b: m(b["x"])[0][:, 0], on_none="zeros"),
        "trainable": lambda: make(frozen),
        "accumulate": lambda: make(accumulate=2 if odd else 1),
        "clip": lambda: make(after_reduce=[clip]),
        "learning rate": lambda: make(optimizer=lambda: sgd(0.02 if odd else 0.01)),
    }
    for name, build_step in differing.items():
        said[f"differing {name}"] = error_of(ConfigError, build_step(), batch(RANK, 0))


def counts():
    for name, numbers in COUNTS.items():
        step = make()
        for index in range(numbers[RANK]):
            step(batch(RANK, index))
        said[f"counts {name}"] = step.join()
        keep(f"counts {name}", step)
    # A second epoch, with as many batches for all, and then by Trainer with differing ones.
    step(batch(RANK, 10))
    keep("counts again", step)
    step = make()
    summary = dt.Trainer(step, progress=False).fit([batch(RANK, i, examples=7) for i in range(COUNTS["uneven"][RANK])])
    said["counts fit"] = {name: summary[name] for name in ("steps", "examples", "epochs")}
    keep("counts fit", step)


def drift():
    warnings = []
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())
    logging.getLogger("disttrain").addHandler(handler)
    for choice in ("raise", "heal"):
        step = make(check_every=2, on_drift=choice)
        for index in range(3):
            step(batch(RANK, index))
        if RANK == 1:
            step.model.get_layer("side").kernel.assign_add([[1.0]] * 5)
        if choice == "raise":
            said["drift"], _ = error_of(DriftError, step, batch(RANK, 3))
        else:
            steps = [step(batch(RANK, index)).step for index in range(3, 7)]
            said["heal"] = {"warnings": warnings, "steps": steps}
            keep("healed", step)


def start():
    """What is not applied in the first step leaves everything as rank 0 had it."""

    def dropout():
        keras.utils.set_random_seed(RANK)
        x = keras.Input((4,))
        return keras.Model(x, keras.layers.Dense(1)(keras.layers.Dropout(0.5, seed=RANK)(keras.layers.Dense(3)(x))))

    loss_fn = lambda model, batch: model(batch["x"], training=True)[:, 0]  # noqa: E731
    step = make(dropout, adam, loss_fn, on_nonfinite="skip")
    model, optimizer = step.model, step.optimizer
    for v in (*optimizer.variables, *model.variables):
        if v is not optimizer._learning_rate:
            v.assign(v.value + tf.cast(RANK, v.dtype))
    everything = [*model.variables, *optimizer.variables]
    for moment in ("before", "after"):
        seen.update({f"start {moment} {i}": copies(v)[0] for i, v in enumerate(everything)})
        step({"x": tf.fill([4, 4], np.nan)})


took = {}
for check in (
    gradients_of_none,
    joined_ranks_reach_nothing,
    whole_table,
    not_finite,
    disagreements,
    counts,
    drift,
    start,
):
    begun = time.monotonic()
    check()
    took[check.__name__] = round(time.monotonic() - begun, 1)
said["took"] = took
arrays(**seen)
report(**said)
comm.close()
