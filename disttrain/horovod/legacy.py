"""What Horovod's scripts say that Keras 3 does not know any more; once this package is imported, it does."""

from __future__ import annotations

import functools

import keras

from disttrain.keras import adapt_compile


class CallableList(list):
    """A list that may be called, for `optimizer.variables()`."""

    def __call__(self) -> CallableList:
        return self


def _owner(cls: type, name: str) -> type:
    return next(base for base in cls.__mro__ if name in vars(base))


@functools.cache
def understand() -> None:
    """Lets Keras take `optimizer.variables()`, `optimizer.lr` and `model.compile(experimental_run_tf_function=...)`."""
    optimizers = _owner(keras.optimizers.Optimizer, "variables")
    variables = vars(optimizers)["variables"].fget
    optimizers.variables = property(lambda self: CallableList(variables(self)), doc=variables.__doc__)

    optimizers.lr = property(
        lambda self: self.learning_rate,
        lambda self, value: setattr(self, "learning_rate", value),
        doc="The learning rate, by the name that it had before Keras 3.",
    )

    adapt_compile()  # which knows Keras's own arguments only, so it comes first
    models = _owner(keras.Model, "compile")
    plain = models.compile

    @functools.wraps(plain)
    def compile(self, *args, experimental_run_tf_function=None, **kwargs):
        return plain(self, *args, **kwargs)

    models.compile = compile
