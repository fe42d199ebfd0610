"""Keras optimizers with gradients that are already reduced."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import keras

from disttrain.errors import ConfigError
from disttrain.types import Variable, name_of


def unwrap(optimizer: keras.optimizers.Optimizer) -> tuple[keras.optimizers.Optimizer, dict]:
    """The optimizer inside a `LossScaleOptimizer`, and the arguments for a `LossScale` that takes its place.

    Keras's own asks replica 0 alone whether gradients are finite, before they are reduced.
    """
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        scaling = {"initial": optimizer.initial_scale, "growth_steps": optimizer.dynamic_growth_steps}
        return optimizer.inner_optimizer, scaling
    return optimizer, {}


def prepare(
    optimizer: keras.optimizers.Optimizer, variables: Sequence[Variable], owns: Callable[[Variable], bool]
) -> None:
    """Builds the optimizer's slots for `variables`, and for these alone.

    Raises:
      ConfigError: not a Keras optimizer, one made outside the communicator's scope, one that accumulates or scales
        losses by itself, or one that was already built for other variables.
    """
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise ConfigError(f"optimizer is {type(optimizer).__name__}; a keras.optimizers.Optimizer is wanted")
    if getattr(optimizer, "gradient_accumulation_steps", None):
        raise ConfigError(
            "the optimizer has gradient_accumulation_steps, which averages means and moves on micro-steps: "
            "leave it out and give TrainStep accumulate="
        )
    if getattr(optimizer, "loss_scale_factor", None):
        raise ConfigError("the optimizer has loss_scale_factor: leave it out; float16 models get a dynamic loss scale")
    if not owns(optimizer.iterations):
        raise ConfigError("the optimizer was made outside comm.scope(): make it inside `with comm.scope():`")
    if optimizer.built:
        _check_built_for(optimizer, variables)
    else:
        optimizer.build(list(variables))


@contextlib.contextmanager
def no_second_reduce(optimizer: keras.optimizers.Optimizer) -> Iterator[None]:
    """Within it, `apply_gradients` applies what it is given.

    In a tf.distribute replica Keras sums gradients once more inside `apply_gradients`, after its own clipping:
    N times the update, clipped in the wrong place. That one method becomes the identity here.
    """
    optimizer._all_reduce_sum_gradients = lambda grads_and_vars: grads_and_vars
    try:
        yield
    finally:
        del optimizer._all_reduce_sum_gradients


def _check_built_for(optimizer, variables) -> None:
    known = {optimizer._var_key(v) for v in optimizer._trainable_variables}
    wanted = {optimizer._var_key(v): v for v in variables}
    missing = [name_of(v) for key, v in wanted.items() if key not in known]
    if missing or len(known) != len(wanted):
        extra = len(known - set(wanted))
        said = [f"it does not know {', '.join(missing)}"] if missing else []
        said += [f"it knows {extra} that are not trained here"] if extra else []
        raise ConfigError(
            f"the optimizer was already built for other variables: {'; '.join(said)}. Make a new optimizer for this step"
        )
