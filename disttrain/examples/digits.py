"""Handwritten digits with a small convolutional network."""

from __future__ import annotations

from typing import Any

import keras
from keras import layers

import disttrain as dt
from disttrain.data import digits
from disttrain.examples.config import TrainConfig, batches, start


def build_model(classes: int = 10) -> keras.Model:
    """Images [n, 8, 8, 1] -> logits [n, classes]. BatchNormalization sees the whole batch, over all replicas."""
    return keras.Sequential(
        [
            layers.Input((8, 8, 1)),
            layers.Conv2D(32, 3, padding="same", use_bias=False),
            layers.BatchNormalization(synchronized=True),
            layers.ReLU(),
            layers.Conv2D(64, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.Dropout(0.25),
            layers.Flatten(),
            layers.Dense(128, activation="relu"),
            layers.Dropout(0.5),
            layers.Dense(classes, dtype="float32", name="head"),
        ],
        name="digits",
    )


def train(config: TrainConfig) -> tuple[keras.Model, dict[str, Any]]:
    """Trains, evaluates on images that were held out, and returns the model and the numbers."""
    comm = start(config)
    seen, held_out = digits.load()
    dataset = batches(config, seen)
    with comm.scope():
        model = build_model()
        schedule = keras.optimizers.schedules.CosineDecay(config.lr, config.total_steps(len(dataset)), alpha=0.01)
        optimizer = keras.optimizers.Adam(schedule)
    step = dt.TrainStep(
        model,
        optimizer,
        loss_fn=dt.losses.sparse_categorical_crossentropy(),
        comm=comm,
        accumulate=config.accumulate,
        after_reduce=config.transforms(),
    )
    validation = batches(config, held_out, shuffle=False)
    numbers = dt.Trainer(step, checkpoint=config.checkpointer()).fit(
        dataset, validation=validation, title="digits", **config.length()
    )
    return model, {"backend": comm.name, "rank": comm.rank, "replicas": comm.size, **numbers}
