"""Small models that examples and benchmarks share."""

from __future__ import annotations

import keras
from keras import layers, ops


def mlp() -> keras.Model:
    """7.9 million parameters, nearly all of them in two matrices."""
    return keras.Sequential(
        [
            layers.Input((784,)),
            *(layers.Dense(2048, activation="relu") for _ in range(2)),
            layers.Dense(1024),
            layers.Dense(10),
        ],
        name="mlp",
    )


def cnn() -> keras.Model:
    """A small convolutional network for 32 x 32 colour images."""
    convolutions = [
        layers.Conv2D(width, 3, padding="same", activation="relu", strides=s)
        for width, s in ((32, 1), (64, 2), (128, 2))
    ]
    return keras.Sequential(
        [layers.Input((32, 32, 3)), *convolutions, layers.GlobalAveragePooling2D(), layers.Dense(10)], name="cnn"
    )


def transformer(
    vocabulary: int = 256, width: int = 192, blocks: int = 4, heads: int = 4, dropout: float = 0.0
) -> keras.Model:
    """A causal byte-level language model: tokens [batch, length] -> logits [batch, length, vocabulary].

    Built of Keras's own layers alone, so that the saved model loads anywhere.
    """
    tokens = layers.Input((None,), dtype="int32")
    positions = ops.cumsum(ops.ones_like(tokens), axis=1) - 1
    x = layers.Embedding(vocabulary, width)(tokens) + layers.Embedding(1024, width)(positions)
    for _ in range(blocks):
        y = layers.LayerNormalization()(x)
        y = layers.MultiHeadAttention(heads, width // heads, dropout=dropout)(y, y, use_causal_mask=True)
        x = x + y
        y = layers.LayerNormalization()(x)
        y = layers.Dense(width)(layers.Dense(4 * width, activation="gelu")(y))
        x = x + layers.Dropout(dropout)(y)
    return keras.Model(tokens, layers.Dense(vocabulary)(layers.LayerNormalization()(x)), name="transformer")
