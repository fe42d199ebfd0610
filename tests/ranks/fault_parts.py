"""What the scripts on faults train, for the tests to train it as well on a single device."""

import keras
import numpy as np
import tensorflow as tf

# By on_none, which labels ranks 0 and 1 have in each step: those of both outputs (b) or of the main one alone (m).
LABELS = {
    "error": ["bb", "bm"],
    "zeros": ["mm", "bm", "mm"],
    "skip": ["bb", "bm", "mm", "bm"],
}
# By name, the number of batches on each rank.
COUNTS = {"uneven": [3, 7, 5], "none": [4, 0, 2]}


def build(seed=0, width=5):
    """A model with two outputs."""
    keras.utils.set_random_seed(seed)
    x = keras.Input((4,))
    hidden = keras.layers.Dense(width, "sigmoid", name="body")(x)
    return keras.Model(x, [keras.layers.Dense(1, name=name)(hidden) for name in ("main", "side")])


def losses(model, batch):
    """Per example: of the main output, and of the side output where the batch has labels for it."""
    main, side = model(batch["x"], training=True)
    squares = tf.square(main[:, 0] - batch["main"])
    return squares + tf.square(side[:, 0] - batch["side"]) if "side" in batch else squares


def batch(rank, index, labels="b", examples=None):
    """What a rank sees in step `index`; 4 to 6 examples if not said otherwise."""
    rng = np.random.default_rng([rank, index])
    x = rng.uniform(0.1, 1, (examples or 4 + (rank + index) % 3, 4)).astype("float32")
    whole = {"x": x, "main": 20 + 5 * x.mean(-1), "side": 30 - 5 * x.mean(-1)}
    return {name: tf.constant(value) for name, value in whole.items() if labels == "b" or name != "side"}


def labels_of(on_none, rank, index):
    return LABELS[on_none][index][rank % 2]


def lookups(model, batch):
    """Losses of a model that is one embedding; "whole" in a batch asks for all of its rows."""
    rows = tf.reduce_mean(model(batch["ids"]), axis=1)
    squares = tf.square(rows - 3.0)
    return squares + tf.reduce_mean(tf.square(model.layers[-1].embeddings - 2.0)) if "whole" in batch else squares


def build_lookups():
    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.Input((), dtype="int32"), keras.layers.Embedding(6, 2, name="table")])


def batch_of_lookups(rank, index):
    """From the third step on, odd ranks ask for the whole table."""
    ids = np.random.default_rng([rank, index]).integers(0, 6, 5).astype("int32")
    return {"ids": tf.constant(ids)} | ({"whole": tf.zeros([5])} if rank % 2 and index >= 2 else {})
