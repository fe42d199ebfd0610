"""Rank 0 writes and reads checkpoints more slowly than the others have patience: busy.py FOLDER STALL_TIMEOUT SECONDS."""

import sys
import time

import keras
from _report import BACKEND, report
from fault_parts import batch, build, losses

import disttrain as dt
from disttrain.checkpoint import files

FOLDER, STALL_TIMEOUT, SECONDS = sys.argv[1], float(sys.argv[2]), float(sys.argv[3])


def slowly(call):
    def later(*args):
        time.sleep(SECONDS)
        return call(*args)

    return later


files.write, files.read_state, files.read_values = map(slowly, (files.write, files.read_state, files.read_values))
comm = dt.init(BACKEND, stall_timeout=STALL_TIMEOUT)
steps = []
for length in (2, 3):  # the second goes on from the first
    keras.backend.clear_session(free_memory=False)
    with comm.scope():
        model, optimizer = build(), keras.optimizers.SGD(0.01)
    step = dt.TrainStep(model, optimizer, loss_fn=losses, comm=comm, jit=False)
    trainer = dt.Trainer(step, progress=False, checkpoint=dt.Checkpointer(FOLDER, every_steps=1))
    steps.append(trainer.fit([batch(0, i, examples=6) for i in range(3)], steps=length)["steps"])
report(steps=steps)
