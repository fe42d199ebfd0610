"""A language model of bytes: a small transformer on any text."""

from __future__ import annotations

from typing import Any

import keras

import disttrain as dt
from disttrain.data import text
from disttrain.examples.config import TrainConfig, batches, start
from disttrain.models import transformer

_LENGTH = 128
_HELD_OUT_PIECES = 64


def train(config: TrainConfig) -> tuple[keras.Model, dict[str, Any]]:
    """Trains, evaluates on the end of the text, and returns the model and the numbers. Its loss is in nats per byte."""
    content, held_out = text.split(text.read(config.text))
    comm = start(config)
    dataset = batches(config, text.windows(content, _LENGTH))
    with comm.scope():
        model = transformer(width=128, blocks=3, dropout=0.1)
        schedule = keras.optimizers.schedules.CosineDecay(config.lr, config.total_steps(len(dataset)), alpha=0.1)
        optimizer = keras.optimizers.AdamW(schedule, weight_decay=0.01)
    step = dt.TrainStep(
        model,
        optimizer,
        loss_fn=dt.losses.sparse_categorical_crossentropy(),
        comm=comm,
        accumulate=config.accumulate,
        after_reduce=config.transforms(),
    )
    numbers = dt.Trainer(step, checkpoint=config.checkpointer()).fit(
        dataset,
        validation=batches(config, text.windows(held_out, _LENGTH, limit=_HELD_OUT_PIECES), shuffle=False),
        title="charlm",
        **config.length(),
    )
    return model, {"backend": comm.name, "rank": comm.rank, "replicas": comm.size, **numbers}
