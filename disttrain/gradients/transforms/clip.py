"""Clipping. It is not linear, so it belongs after the all-reduce: clip(mean) is not mean(clip)."""

from __future__ import annotations

import tensorflow as tf

from disttrain.errors import ConfigError
from disttrain.gradients import sparse
from disttrain.gradients.transforms.chain import Transform


def clip_by_value(limit: float) -> Transform:
    """Limits every element to [-limit, limit]."""
    _check_positive("clip_by_value", limit)

    def clip(gradients, variables):
        return [sparse.map_values(lambda x: tf.clip_by_value(x, -limit, limit), g) for g in gradients]

    return clip


def clip_by_norm(limit: float) -> Transform:
    """Scales each gradient whose L2 norm is above `limit` down to that norm, variable by variable."""
    _check_positive("clip_by_norm", limit)

    def clip(gradients, variables):
        return [g if g is None else _shrink(g, tf.sqrt(sparse.square_sums([g])[0]), limit) for g in gradients]

    return clip


def clip_by_global_norm(limit: float) -> Transform:
    """Scales all gradients by one factor so that their joint L2 norm is at most `limit` (Pascanu et al., 2013)."""
    _check_positive("clip_by_global_norm", limit)

    def clip(gradients, variables):
        norm = tf.sqrt(tf.add_n(sparse.square_sums([g for g in gradients if g is not None])))
        return [sparse.map_values(lambda x: _shrink(x, norm, limit), g) for g in gradients]

    return clip


def _shrink(gradient, norm: tf.Tensor, limit: float):
    factor = limit / tf.maximum(norm, limit)
    return sparse.map_values(lambda x: x * tf.cast(factor, x.dtype), gradient)


def _check_positive(name: str, limit: float) -> None:
    if not limit > 0:
        raise ConfigError(f"{name}({limit!r}): the limit must be above zero")
