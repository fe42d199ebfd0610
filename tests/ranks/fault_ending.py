"""Trains until a fault ends the job. Arguments: the fault, the rank that it strikes, stall_timeout."""

import sys
import time

import keras
import tensorflow as tf
from _report import BACKEND, RANK, mark, report  # first: it writes down the process's id
from fault_parts import batch, build, losses

import disttrain as dt

FAULT, VICTIM, STALL_TIMEOUT = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
STEPS_BEFORE = 3


def fault():
    mark("fault")
    if FAULT == "raise":
        raise ValueError("a mistake in the loop")
    if FAULT == "exit":
        sys.exit(3)
    if FAULT == "busy":  # for longer than the others are patient otherwise, and then gone astray
        with comm.busy("an errand"):
            time.sleep(2 * STALL_TIMEOUT)
    if FAULT in ("sleep", "busy"):
        time.sleep(1000)


def batches():
    for index in range(1_000_000):
        if RANK == VICTIM and index == STEPS_BEFORE and FAULT == "generator":
            mark("fault")
            raise ValueError("a mistake in the generator")
        yield batch(RANK, index)


def loss_fn(model, examples):
    if "side" not in examples:
        raise ValueError("a mistake in the loss")
    return losses(model, examples)


comm = dt.init(BACKEND, stall_timeout=STALL_TIMEOUT)
with comm.scope():
    model, optimizer = build(), keras.optimizers.SGD(0.01)
step = dt.TrainStep(model, optimizer, loss_fn=loss_fn, comm=comm, jit=False)
spec = {"x": tf.TensorSpec([None, 4]), "main": tf.TensorSpec([None]), "side": tf.TensorSpec([None])}
for index, examples in enumerate(tf.data.Dataset.from_generator(batches, output_signature=spec)):
    if index == STEPS_BEFORE:
        mark("trained")
    if RANK == VICTIM and index == STEPS_BEFORE:
        if FAULT == "loss_fn":
            del examples["side"]
            mark("fault")
        else:
            fault()
    step(examples)
report(came="to its end")
