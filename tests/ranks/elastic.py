"""A slow training whose workers come and go: python elastic.py FOLDER STEPS. Notes what has gone into each step."""

import json
import os
import sys
import time
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

import disttrain as dt
from disttrain.data import digits

FOLDER, STEPS = Path(sys.argv[1]), int(sys.argv[2])
# So that a signal finds the training at work, not at its end.
SECONDS = float(os.environ.get("STEP_SECONDS", "0.05"))
FACTORS = {"a": 1, "b": 7, "c": 331}
FAIL_AT = int(os.environ.get("FAIL_AT", "-1"))

comm = dt.init(stall_timeout=float(os.environ.get("STALL_TIMEOUT", "20")))
keras.utils.set_random_seed(11)
(images, labels), _ = digits.load()
with comm.scope():
    layers = [keras.layers.Flatten(), keras.layers.Dense(64, "relu"), keras.layers.Dense(10)]
    model = keras.Sequential([keras.Input((8, 8, 1)), *layers])
    optimizer = keras.optimizers.Adam(3e-3)


def loss_fn(model, batch, training=True):
    """The metrics say which examples were in the batch: they are summed in the all-reduce itself, with the gradients."""
    x, y, ids = batch
    losses = keras.losses.sparse_categorical_crossentropy(y, model(x, training=training), from_logits=True)
    count = tf.cast(tf.size(ids), tf.float32)
    sums = {name: tf.reduce_sum(tf.cast(ids * factor % 1009, tf.float32)) for name, factor in FACTORS.items()}
    return dt.Loss(tf.reduce_sum(losses), count, {name: (x, count) for name, x in sums.items()})


class Noting(dt.TrainStep):
    """Writes down what was done in every step, and by how many ranks."""

    def __call__(self, batch, *, stop=False):
        time.sleep(SECONDS)
        before = self.last
        try:
            return super().__call__(batch, stop=stop)
        finally:
            # Where a rank is lost right after a step, in the comparison of weights, it has happened all the same.
            if self.last is not before:
                note(self.last, self.micro_batches)


def note(out, micro_batches):
    if out.step == FAIL_AT:
        raise ValueError(f"a mistake of step {out.step}")
    examples = int(out.examples)
    sums = {name: round(float(mean) * examples) for name, mean in out.metrics.items()}
    said = {"step": out.step, "ranks": comm.size, "loss": float(out.loss), "examples": examples, **sums}
    said |= {"time": time.time(), "parts": -(-micro_batches // comm.size)}
    with (FOLDER / f"seen-{os.getpid()}.jsonl").open("a") as file:
        file.write(json.dumps(said) + "\n")


class Slow:
    """Four batches, one second each, for a validation in which something happens."""

    def __iter__(self):
        (FOLDER / f"validating-{os.getpid()}").touch()
        for batch in data.epoch(0).take(4):
            time.sleep(1)
            yield batch


step = Noting(model, optimizer, loss_fn=loss_fn, comm=comm, accumulate=2, jit=False, check_every=7)
data = dt.data.Batches((images, labels, np.arange(len(images))), 100, seed=4)
(FOLDER / f"here-{os.getpid()}").write_text(os.environ["HOROVOD_HOSTNAME"])
checkpoint = dt.Checkpointer(FOLDER / "checkpoints", every_steps=5) if "CHECKPOINTS" in os.environ else None
trainer = dt.Trainer(step, progress=False, checkpoint=checkpoint)
try:
    trainer.fit(tf.data.Dataset.range(10).shuffle(10, seed=1).batch(5))
except dt.errors.DataError as error:
    (FOLDER / f"refused-{os.getpid()}").write_text(str(error))
summary = trainer.fit(data, steps=STEPS, validation=Slow() if "VALIDATE" in os.environ else None)
np.savez(FOLDER / f"end-{os.getpid()}.npz", *[v.numpy() for v in step.state])
(FOLDER / f"end-{os.getpid()}.json").write_text(json.dumps({"rank": comm.rank, **summary}))
comm.close()
