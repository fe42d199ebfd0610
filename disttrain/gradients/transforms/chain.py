"""Composition."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import tensorflow as tf

from disttrain.errors import ConfigError
from disttrain.types import Gradient, Variable

Transform: TypeAlias = Callable[[list[Gradient], Sequence[Variable]], list[Gradient]]


class chain(tf.Module):
    """Applies transforms one after the other. `chain()` changes nothing.

    Raises:
      ConfigError: one of them cannot be called.
    """

    def __init__(self, *transforms: Transform):
        super().__init__(name="chain")
        for transform in transforms:
            if not callable(transform):
                raise ConfigError(
                    f"{transform!r} is no transform: a function of (gradients, variables) that returns gradients is wanted"
                )
        self.transforms = list(transforms)

    def build(self, variables: Sequence[Variable]) -> None:
        """Makes the state of those that have any."""
        for transform in self.transforms:
            if hasattr(transform, "build"):
                transform.build(variables)

    def select(self, variables: Sequence[Variable]) -> list[Variable]:
        """The variables that `freeze` and `only` leave to be trained, so that the others need not even be computed."""
        for transform in self.transforms:
            if hasattr(transform, "select"):
                variables = transform.select(variables)
        return list(variables)

    def __call__(self, gradients, variables):
        for transform in self.transforms:
            gradients = transform(gradients, variables)
        return gradients

    def __bool__(self):
        return bool(self.transforms)
