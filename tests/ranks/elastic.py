"""A slow training whose workers come and go: python elastic.py FOLDER STEPS. Notes which examples each step has seen."""

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
SECONDS = float(os.environ.get("STEP_SECONDS", "0.05"))

comm = dt.init(stall_timeout=float(os.environ.get("STALL_TIMEOUT", "20")))
keras.utils.set_random_seed(11)
(images, labels), _ = digits.load()
with comm.scope():
    layers = [keras.layers.Flatten(), keras.layers.Dense(64, "relu"), keras.layers.Dense(10)]
    model = keras.Sequential([keras.Input((8, 8, 1)), *layers])
    optimizer = keras.optimizers.Adam(3e-3)


def losses(model, batch, training=True):
    x, y, _ = batch
    return keras.losses.sparse_categorical_crossentropy(y, model(x, training=training), from_logits=True)


class Noting(dt.TrainStep):
    """Writes down the examples of every step that was done, and of how many ranks this was one."""

    def __call__(self, batch, *, stop=False):
        time.sleep(SECONDS)
        out = super().__call__(batch, stop=stop)
        note = {"step": out.step, "ranks": comm.size, "parts": self._parts, "examples": batch[2].numpy().tolist()}
        note["loss"] = float(out.loss)
        with (FOLDER / f"seen-{os.getpid()}.jsonl").open("a") as file:
            file.write(json.dumps(note) + "\n")
        return out


step = Noting(model, optimizer, loss_fn=losses, comm=comm, accumulate=2, jit=False, check_every=7)
data = dt.data.Batches((images, labels, np.arange(len(images))), 100, seed=4)
(FOLDER / f"here-{os.getpid()}").write_text(os.environ.get("HOROVOD_HOSTNAME", "") + ":" + str(comm.rank))
summary = dt.Trainer(step, progress=False).fit(data, steps=STEPS)
np.savez(FOLDER / f"end-{os.getpid()}.npz", *[v.numpy() for v in step.state])
(FOLDER / f"end-{os.getpid()}.json").write_text(json.dumps({"rank": comm.rank, **summary}))
comm.close()
