"""Trains on TFRecords, and notes which examples each step has seen on this rank: python data_sources.py PATTERN."""

import sys

import _report
import keras
import numpy as np
import tensorflow as tf

import disttrain as dt
from disttrain.data import Batches, TFRecords, source
from disttrain.errors import DataError

FEATURES = {"id": tf.io.FixedLenFeature([], tf.int64), "x": tf.io.FixedLenFeature([3], tf.float32)}

comm = dt.init(_report.BACKEND)
keras.utils.set_random_seed(3)
with comm.scope():
    model, optimizer = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)]), keras.optimizers.SGD(1e-3)
seen = []


class Noting(dt.TrainStep):
    def __call__(self, batch, *, stop=False):
        seen.append(batch["id"].numpy().tolist())
        return super().__call__(batch, stop=stop)


def losses(model, batch, training=True):
    return tf.square(model(batch["x"], training=training)[:, 0] - 1.0)


step = Noting(model, optimizer, loss_fn=losses, comm=comm, jit=False)
trainer = dt.Trainer(step, progress=False)
summary = trainer.fit(Batches(TFRecords(sys.argv[1], FEATURES), 8, seed=3), epochs=2)
_report.arrays(weights=np.concatenate([v.numpy().ravel() for v in model.trainable_variables]))

files = source.find(sys.argv[1])
mine = files[: 3 if comm.rank == 1 else 4]  # one rank has not got all files, and another seed
pipeline = tf.data.TFRecordDataset(files).shuffle(17, seed=8 if comm.rank == 1 else 7).batch(8)
said = []
for data in (Batches(TFRecords(mine, FEATURES), 8), pipeline.map(lambda x: tf.io.parse_example(x, FEATURES))):
    try:
        trainer.fit(data)
    except DataError as error:
        said.append(str(error))
_report.report(seen=seen, examples=summary["examples"], said=said)
comm.close()
