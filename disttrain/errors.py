"""Every error that disttrain raises on purpose. Each message names the culprit and the mend."""

# Exit codes of a rank. A launcher starts a job that ended with the first again, and blames another rank for the second.
EXIT_RESUME = 75
EXIT_FOLLOWED = 76


class DisttrainError(Exception):
    """Base class: the command line prints these in one line, without a traceback."""

    # Raised while AutoGraph converts a tf.function, it stays what it is.
    ag_pass_through = True


class ConfigError(DisttrainError, ValueError):
    """An option, a model or an optimizer that cannot be trained as asked."""


class BackendError(DisttrainError, RuntimeError):
    """A communication backend that is unknown, not installed or cannot start here."""


class DataError(DisttrainError, ValueError):
    """A batch or a data file that cannot be used as it is."""


class LossError(DisttrainError, ValueError):
    """A loss that does not say what it sums and over how much weight, or labels that do not fit."""


class GradientError(DisttrainError, ValueError):
    """A variable that the loss does not reach."""


class NonFiniteError(DisttrainError, ArithmeticError):
    """Gradients or a loss that hold NaN or infinity; nothing was applied on any replica."""


class DriftError(DisttrainError, RuntimeError):
    """Weights that are no longer the same on all ranks."""


class Preempted(SystemExit):
    """Training was asked to end and has saved. Not an error: it ends the process with `EXIT_RESUME`."""

    def __init__(self, said: str):
        super().__init__(EXIT_RESUME)
        self.said = said

    def __str__(self):
        return self.said
