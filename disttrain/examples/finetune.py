"""Fine-tuning: learn the digits 0 to 4, then freeze all but the head and learn 5 to 9."""

from __future__ import annotations

from typing import Any

import keras

import disttrain as dt
from disttrain.data import digits
from disttrain.examples.config import TrainConfig, batches, start
from disttrain.examples.digits import build_model


def train(config: TrainConfig) -> tuple[keras.Model, dict[str, Any]]:
    """Trains twice with one model; the second time nothing but the head moves. Returns the model and the numbers."""
    comm = start(config)
    seen, held_out = digits.load()
    with comm.scope():
        model = build_model()
    numbers: dict[str, Any] = {"backend": comm.name, "rank": comm.rank, "replicas": comm.size}
    # The head alone is a linear problem, which bears a larger learning rate.
    for phase, kept, variables, lr in (
        ("digits 0 to 4", range(5), None, config.lr),
        ("digits 5 to 9", range(5, 10), dt.transforms.only("head/*"), 10 * config.lr),
    ):
        if variables is not None:
            freeze_statistics(model)
        with comm.scope():
            optimizer = keras.optimizers.Adam(lr)
        step = dt.TrainStep(
            model,
            optimizer,
            loss_fn=dt.losses.sparse_categorical_crossentropy(),
            comm=comm,
            accumulate=config.accumulate,
            variables=variables,
            after_reduce=config.transforms(),
        )
        numbers[phase] = dt.Trainer(step, checkpoint=config.checkpointer(phase.replace(" ", "-"))).fit(
            batches(config, seen.only(kept)),
            validation=batches(config, held_out.only(kept), shuffle=False),
            title=phase,
            **config.length(),
        )
        numbers[phase]["trained_variables"] = [v.path for v in step.variables]
    return model, {**numbers, **numbers["digits 5 to 9"]}


def freeze_statistics(model: keras.Model) -> None:
    """BatchNormalization keeps the moments of what it learned first: Keras runs a frozen one in inference mode."""
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.trainable = False
