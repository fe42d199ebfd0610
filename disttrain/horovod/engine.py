"""Horovod itself, of which its tensor ops are used, and what passes values between it and Keras 3."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from disttrain.errors import BackendError
from disttrain.types import tf_variable
from disttrain.world import elastic_job

try:
    import horovod.tensorflow as hvd
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "horovod":
        raise BackendError(f"Horovod cannot be imported ({error}): run `disttrain build-horovod`") from error
    raise BackendError("Horovod is not installed: run `disttrain build-horovod`") from error
except (ImportError, tf.errors.OpError) as error:
    raise BackendError(f"Horovod cannot be imported ({error}): run `disttrain build-horovod`") from error

__all__ = ["elastic_job", "hvd", "plain", "takes_keras"]


def plain(value: Any) -> Any:
    """TensorFlow variables in the place of Keras's, in lists and tuples, too."""
    if isinstance(value, keras.Variable):
        return tf_variable(value)
    if type(value) in (list, tuple):
        return type(value)(map(plain, value))
    return value


def takes_keras(fn: Callable) -> Callable:
    """Horovod's function, told of Keras variables."""

    @functools.wraps(fn)
    def wrapper(*args, **kwargs):
        return fn(*map(plain, args), **{name: plain(value) for name, value in kwargs.items()})

    return wrapper
