"""What input costs the training loop: steps fed by `Batches` against the same steps on one batch held in memory."""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from PIL import Image

import disttrain as dt
from disttrain.bench.workloads import WORKLOADS

_STEPS = 32  # of a round: an epoch, with the start of its readers
_FILES, _CLASSES = 8, 10
_WARM_UP = 3


def compare_input(kinds: Iterable[str], rounds: int) -> Iterator[dict[str, Any]]:
    """Times epochs, fed and held taking turns; the ratio is the median of the rounds' own ratios.

    Args:
      kinds: of `SOURCES`.

    Returns:
      for each kind: milliseconds of a step on the held batch and of one that is fed, their ratio, and milliseconds that
      reading a batch takes by itself, with nothing to hide behind.
    """
    make_model, batch_size = WORKLOADS["cnn"]
    comm = dt.init("local")
    loss_fn = dt.losses.sparse_categorical_crossentropy()
    step = dt.TrainStep(make_model(), keras.optimizers.Adam(1e-3), loss_fn=loss_fn, comm=comm, jit=False)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (_STEPS * batch_size, 32, 32, 3), dtype=np.uint8)
    labels = rng.integers(0, _CLASSES, len(images), dtype=np.int32)
    for kind in kinds:
        with tempfile.TemporaryDirectory() as folder:
            batches = SOURCES[kind](Path(folder), images, labels, batch_size)
            held = [next(iter(batches))] * _STEPS
            _seconds(step, comm.distribute(held[:_WARM_UP]))
            alone = [_seconds(lambda batch: None, batches.epoch(i)) for i in range(rounds)]
            pairs = []
            for i in range(rounds):
                sides = [comm.distribute(held), comm.distribute(batches.epoch(i))]
                times = [_seconds(step, side) for side in (sides if i % 2 else sides[::-1])]
                pairs.append(times if i % 2 else times[::-1])
        held_times, fed_times = zip(*pairs, strict=True)
        yield {
            "source": kind,
            "held_ms": 1e3 * statistics.median(held_times) / _STEPS,
            "fed_ms": 1e3 * statistics.median(fed_times) / _STEPS,
            "ratio": statistics.median(fed / held for held, fed in pairs),
            "alone_ms": 1e3 * statistics.median(alone) / _STEPS,
        }


def _seconds(step: Callable[[Any], Any], batches: Iterable) -> float:
    start = time.perf_counter()
    for batch in batches:
        step(batch)
    return time.perf_counter() - start


def _arrays(folder: Path, images: np.ndarray, labels: np.ndarray, batch_size: int) -> dt.data.Batches:
    return dt.data.Batches((images.astype("float32") / np.float32(255), labels), batch_size)


def _tfrecords(folder: Path, images: np.ndarray, labels: np.ndarray, batch_size: int) -> dt.data.Batches:
    features = {"image": tf.io.FixedLenFeature([], tf.string), "label": tf.io.FixedLenFeature([], tf.int64)}
    for number, rows in enumerate(np.array_split(np.arange(len(labels)), _FILES)):
        with tf.io.TFRecordWriter(str(folder / f"{number}.tfrecord")) as writer:
            for row in rows:
                image = tf.train.Feature(bytes_list=tf.train.BytesList(value=[images[row].tobytes()]))
                label = tf.train.Feature(int64_list=tf.train.Int64List(value=[labels[row]]))
                example = tf.train.Example(features=tf.train.Features(feature={"image": image, "label": label}))
                writer.write(example.SerializeToString())

    def decode(examples: dict[str, tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor]:
        pixels = tf.reshape(tf.io.decode_raw(examples["image"], tf.uint8), (-1, *images.shape[1:]))
        return tf.cast(pixels, tf.float32) / 255, tf.cast(examples["label"], tf.int32)

    return dt.data.Batches(dt.data.TFRecords(str(folder / "*.tfrecord"), features), batch_size, map=decode)


def _images(folder: Path, images: np.ndarray, labels: np.ndarray, batch_size: int) -> dt.data.Batches:
    for number in range(_CLASSES):
        (folder / str(number)).mkdir()
    for number, image, label in zip(itertools.count(), images, labels, strict=False):
        Image.fromarray(image).save(folder / str(label) / f"{number}.png")
    return dt.data.Batches(dt.data.ImageFolder(folder, images.shape[1:3]), batch_size)


# Name -> what makes batches of these images and labels, of what it has written to a folder.
SOURCES: dict[str, Callable[[Path, np.ndarray, np.ndarray, int], dt.data.Batches]] = {
    "arrays": _arrays,
    "tfrecords": _tfrecords,
    "images": _images,
}
