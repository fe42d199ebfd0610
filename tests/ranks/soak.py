"""A slow training with checkpoints, to be killed: python soak.py FOLDER STEPS. Notes which examples each step has seen."""

import json
import os
import sys
import time
from pathlib import Path

import keras
import numpy as np

import disttrain as dt
from disttrain.data import digits

FOLDER, STEPS = Path(sys.argv[1]), int(sys.argv[2])
# So that a signal finds the training at work, not at its end.
SECONDS = 0.03

comm = dt.init()
keras.utils.set_random_seed(11)
(images, labels), _ = digits.load()
with comm.scope():
    layers = [keras.layers.Flatten(), keras.layers.Dense(64, "relu"), keras.layers.Dropout(0.3), keras.layers.Dense(10)]
    model = keras.Sequential([keras.Input((8, 8, 1)), *layers])
    optimizer = keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(3e-3, STEPS))


def losses(model, batch, training=True):
    x, y, _ = batch
    return keras.losses.sparse_categorical_crossentropy(y, model(x, training=training), from_logits=True)


class Noting(dt.TrainStep):
    """Writes down the examples of every step, before it is done: the others may do it and save while this rank is killed."""

    def __call__(self, batch, *, stop=False):
        time.sleep(SECONDS)
        number = int(self.optimizer.iterations.numpy()) + 1
        note = {"attempt": int(os.environ["SOAK_ATTEMPT"]), "step": number, "examples": batch[2].numpy().tolist()}
        with (FOLDER / f"seen-{comm.rank}.jsonl").open("a") as file:
            file.write(json.dumps(note) + "\n")
        out = super().__call__(batch, stop=stop)
        assert out.step == number
        return out


step = Noting(model, optimizer, loss_fn=losses, comm=comm, jit=False)
data = dt.data.Batches((images, labels, np.arange(len(images))), 200, seed=4)
checkpoint = dt.Checkpointer(FOLDER / "checkpoints", every_steps=3, keep=3)
dt.Trainer(step, progress=False, checkpoint=checkpoint).fit(data, steps=STEPS)
comm.close()
