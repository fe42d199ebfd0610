"""What benchmarks train: models, with random batches of the right shape."""

from __future__ import annotations

from collections.abc import Callable

import keras
import numpy as np

from disttrain.models import cnn, mlp, transformer

_SEED = 1

# Name -> how to make the model, and examples in a batch.
WORKLOADS: dict[str, tuple[Callable[[], keras.Model], int]] = {
    "mlp": (mlp, 64),
    "cnn": (cnn, 128),
    "transformer": (transformer, 8),
}


def batch_for(model: keras.Model, examples: int, length: int = 128, seed: int = _SEED) -> tuple[np.ndarray, np.ndarray]:
    """Random inputs and labels."""
    rng = np.random.default_rng(seed)
    if model.name == "transformer":
        text = rng.integers(0, 256, (examples, length + 1), dtype=np.int32)
        return text[:, :-1], text[:, 1:]
    inputs = rng.normal(size=(examples, *model.input_shape[1:])).astype("float32")
    return inputs, rng.integers(0, 10, examples, dtype=np.int32)
