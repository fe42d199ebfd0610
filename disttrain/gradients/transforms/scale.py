"""Scaling by layer, and centering."""

from __future__ import annotations

from collections.abc import Mapping

import tensorflow as tf

from disttrain.gradients import sparse
from disttrain.gradients.transforms.chain import Transform
from disttrain.gradients.transforms.select import fits


def scale_by_layer(factors: Mapping[str, float]) -> Transform:
    """Multiplies gradients by the factor of the first shell pattern that fits the variable's name; else by one.

    With plain SGD this is a learning rate by layer; optimizers that normalise, as Adam does, undo it.
    """

    def factor_of(variable) -> float:
        return next((f for pattern, f in factors.items() if fits(variable, pattern)), 1.0)

    def scale(gradients, variables):
        factors = map(factor_of, variables)
        return [sparse.map_values(lambda x, f=f: x * f, g) for g, f in zip(gradients, factors, strict=True)]

    return scale


def centralize() -> Transform:
    """Takes the mean over all axes but the last off every gradient of rank 2 or more (Yong et al., 2020)."""

    def center(gradient, variable):
        if gradient is None or len(variable.shape) < 2:
            return gradient
        dense = sparse.densify(gradient, variable)
        return dense - tf.reduce_mean(dense, axis=list(range(dense.shape.rank - 1)), keepdims=True)

    return lambda gradients, variables: [center(g, v) for g, v in zip(gradients, variables, strict=True)]
