"""Which variables train, by name. The others stay bitwise as they are, weight decay included."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence

from disttrain.errors import ConfigError
from disttrain.types import Variable, name_of


def freeze(*patterns: str) -> Select:
    """Trains all variables but those whose name fits one of the shell patterns, such as "backbone/*".

    Given to `TrainStep` as `variables=`, or among its transforms, frozen variables get no gradient, no optimizer slot
    and no communication.
    """
    return Select(f"freeze{patterns}", patterns, lambda fits: not fits)


def only(*patterns: str) -> Select:
    """Trains those variables alone whose name fits one of the shell patterns, such as "head/*". See `freeze`."""
    return Select(f"only{patterns}", patterns, bool)


def fits(variable: Variable, pattern: str) -> bool:
    """Whether a shell pattern fits the variable's path or the end of it.

    "head/*" fits "head/kernel" and "sequential_3/head/kernel": Keras numbers models, and nobody should have to know how.
    """
    return any(fnmatch.fnmatch(name_of(variable), p) for p in (pattern, f"*/{pattern}"))


class Select:
    """A choice of variables; as a transform, it takes the gradients of the others away."""

    def __init__(self, name: str, patterns: Sequence[str], keep: Callable[[bool], bool]):
        if not patterns:
            raise ConfigError(f"{name}: give at least one pattern of variable names")
        self._name, self._patterns, self._keep = name, patterns, keep

    def select(self, variables: Sequence[Variable]) -> list[Variable]:
        """The variables that train.

        Raises:
          ConfigError: a pattern fits no variable, or nothing is left to train.
        """
        for pattern in self._patterns:
            if not any(fits(v, pattern) for v in variables):
                names = ", ".join(map(name_of, variables))
                raise ConfigError(f"{self._name}: {pattern!r} fits none of the variables {names}")
        kept = [v for v in variables if self._trains(v)]
        if not kept:
            raise ConfigError(f"{self._name} leaves no variable to train")
        return kept

    def __call__(self, gradients, variables):
        return [g if self._trains(v) else None for g, v in zip(gradients, variables, strict=True)]

    def _trains(self, variable: Variable) -> bool:
        return self._keep(any(fits(variable, pattern) for pattern in self._patterns))
