"""Trains the small problem, with checkpoints, until it is done or killed: resume.py FOLDER STEPS SECONDS (of a step)."""

import sys
import time

import tensorflow as tf
from _report import BACKEND, arrays, mark, report
from problem import OPTIMIZERS, batches, build, losses

import disttrain as dt

FOLDER, STEPS, SECONDS = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])

comm = dt.init(BACKEND)
with comm.scope():
    model, optimizer = build(), OPTIMIZERS["adam"]()


class Slow(dt.TrainStep):
    def __call__(self, batch, *, stop=False):
        time.sleep(SECONDS)
        out = super().__call__(batch, stop=stop)
        if out.step == 5:
            mark("step 5")
        return out


step = Slow(model, optimizer, loss_fn=losses, comm=comm, jit=False)
data = tf.data.Dataset.from_generator(
    lambda: iter(batches(29)), output_signature=(tf.TensorSpec([None, 4]), tf.TensorSpec([None]))
)
checkpoint = dt.Checkpointer(FOLDER, every_steps=1)
started_at = checkpoint.latest() if comm.is_chief else None
said = dt.Trainer(step, progress=False, checkpoint=checkpoint).fit(data, steps=STEPS)
arrays(**{str(i): v.numpy() for i, v in enumerate(model.trainable_variables)})
report(start=int(started_at.folder.name[5:]) if started_at else 0, steps=said["steps"])
