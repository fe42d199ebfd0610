"""When checkpoints are written, how many are kept, and which is taken to go on from."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from disttrain.checkpoint import files
from disttrain.checkpoint.export import export
from disttrain.errors import ConfigError, DataError
from disttrain.types import Variable, name_of, tf_variable

log = logging.getLogger("disttrain")

# Of the thread that writes, as `nice` counts: it takes what the training leaves.
_NICE = 10


class Saved(NamedTuple):
    """A checkpoint that was found whole.

    Attributes:
      folder: where it is.
      state: what was saved beside the variables: JSON.
    """

    folder: Path
    state: dict[str, Any]


class Checkpointer:
    """Saves a training, and finds what was saved.

    A checkpoint is a folder `step-N` with the variables in TensorFlow's format, the position in the data and checksums. It is
    written in the background, under a temporary name until it is whole. Where that fails (a full disk, say), training goes
    on with a warning, and older checkpoints stay. One that was damaged is passed over with a warning, and the one before it
    is taken.

    Args:
      directory: for the checkpoints; rank 0 alone writes and reads it.
      every_steps, every_minutes: how often; both may be given. Neither: at the end and on request (SIGTERM) alone.
      keep: so many are kept, the newest.
      resume: whether a training that finds a checkpoint here goes on from it. False: it starts anew, and refuses to where
        there is one already.

    Raises:
      ConfigError: a number that is out of range.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        every_steps: int | None = None,
        every_minutes: float | None = None,
        keep: int = 3,
        resume: bool = True,
    ):
        for name, value, least in (("every_steps", every_steps, 1), ("keep", keep, 1)):
            if value is not None and (not isinstance(value, int) or value < least):
                raise ConfigError(f"{name}={value!r}: a whole number of {least} or more is wanted")
        if every_minutes is not None and not every_minutes > 0:
            raise ConfigError(f"every_minutes={every_minutes!r}: must be above zero")
        self.directory, self.keep, self.resume = Path(directory), keep, resume
        self._every_steps, self._every_seconds = every_steps, every_minutes and 60 * every_minutes
        self._saved_at, self._writing = time.monotonic(), None
        self._error, self._broken, self._tidied = "", set(), False

    def due(self, step: int) -> bool:
        """Whether it is time to save, after so many steps."""
        by_steps = self._every_steps is not None and step % self._every_steps == 0
        return by_steps or bool(self._every_seconds and time.monotonic() - self._saved_at > self._every_seconds)

    def save(self, step: int, variables: Sequence[Variable], state: dict[str, Any]) -> None:
        """Takes hold of the values and returns; they are written meanwhile. `state` must be JSON."""
        self.wait()
        self._saved_at = time.monotonic()
        args = (step, _values(variables), state)
        self._writing = threading.Thread(target=self._write, args=args, name="disttrain-checkpoint")
        self._writing.start()

    def wait(self) -> str:
        """Returns when nothing is being written: why the last checkpoint could not be, or nothing."""
        if self._writing:
            self._writing.join()
            self._writing = None
        return self._error

    def latest(self) -> Saved | None:
        """The newest checkpoint that is whole; None where there is none.

        Raises:
          ConfigError: there is one, and `resume` is False.
          DataError: the folder cannot be read, so that nobody knows whether there is one.
        """
        self.wait()
        try:
            folders = files.find(self.directory)
        except OSError as error:
            raise DataError(
                f"cannot look for checkpoints in {self.directory} ({error.strerror}): make it readable, or choose another folder"
            ) from error
        for step, folder in reversed(folders):
            if not self.resume:
                raise ConfigError(
                    f"{folder} is there already, and this training is to start anew: go on from it (resume=True, --resume auto), "
                    "or choose another folder"
                )
            try:
                return Saved(folder, files.read_state(folder))
            except DataError as error:
                self._broken.add(folder)
                log.warning("the checkpoint of step %d is passed over: %s", step, error)
            except OSError as error:  # it may be whole all the same, and stays
                log.warning("the checkpoint of step %d is passed over: %s cannot be read (%s)", step, folder, error)
        return None

    def load(self, saved: Saved, variables: Sequence[Variable]) -> None:
        """Gives the variables the values that were saved.

        Raises:
          DataError: the checkpoint is of another model or optimizer; what differs is named.
        """
        self._load(saved, variables, whole=True)

    def export(self, model: keras.Model, path: str | Path, saved: Saved | None = None) -> Saved:
        """Writes a model with the weights of a checkpoint, for others to use; the model has these weights afterwards.

        Args:
          model: the one that was trained, or made anew in the same way; its optimizer is not needed.
          path: ending in ".keras": for `keras.models.load_model`. Else a folder, a SavedModel that serves inference.
          saved: the checkpoint; default: the newest that is whole.

        Raises:
          ConfigError: the model has no variables yet.
          DataError: there is no checkpoint, or it is of another model; or the file cannot be written.
        """
        if not model.weights:
            raise ConfigError("the model has no variables yet: call it on a batch, or build it, and export it then")
        saved = saved or self.latest()
        if saved is None:
            raise DataError(f"there is no whole checkpoint in {self.directory}: nothing to export")
        # In the order of a step's state, which numbers those that have one name.
        self._load(saved, [*model.non_trainable_weights, *model.trainable_weights], whole=False)
        export(model, Path(path))
        return saved

    def _load(self, saved: Saved, variables: Sequence[Variable], *, whole: bool) -> None:
        """`whole`: all that is in the checkpoint must be among the variables."""
        try:
            values, named = files.read_values(saved.folder), _named(variables)
        except OSError as error:
            raise DataError(f"{saved.folder} cannot be read ({error})") from error
        said = [f"{name} is not in it" for name in named if name not in values]
        if whole:
            said += [f"{name} is not in the model or its optimizer" for name in values if name not in named]
        said += [
            f"{name} has shape {tuple(values[name].shape)} in it and {tuple(v.shape)} here"
            for name, v in named.items()
            if name in values and tuple(values[name].shape) != tuple(v.shape)
        ]
        if said:
            more = f", and {len(said) - 3} more" if len(said) > 3 else ""
            mend = "Choose another folder, or build the same"
            if set(map(_unnumbered, named)) <= set(map(_unnumbered, values)):
                # As in a notebook, in which the model is built a second time.
                mend = "Names differ by numbers alone: keras.utils.clear_session() before building lets them begin anew"
            raise DataError(f"{saved.folder} is not of this training: {', '.join(said[:3])}{more}. {mend}")
        for name, variable in named.items():
            variable.assign(values[name])

    def _write(self, step: int, values: dict[str, tf.Tensor], state: dict[str, Any]) -> None:
        _step_back()
        if not self._tidied:
            with contextlib.suppress(OSError):
                files.tidy(self.directory)
            self._tidied = True
        try:
            files.write(self.directory / f"step-{step:09d}", values, state)
            self._error = ""
        except Exception as error:  # whatever it is: a thread that dies tells nobody
            known = self._known()
            left = f"the last one is {known[-1][1]}" if known else "there is none yet"
            said = getattr(error, "strerror", None) or error
            self._error = f"no checkpoint of step {step} in {self.directory} ({said})"
            log.warning("no checkpoint of step %d in %s (%s); training goes on, %s", step, self.directory, said, left)
            return
        known = self._known()
        # Those that were found damaged must not push out what is whole.
        broken = [folder for at, folder in known if folder in self._broken and at > step]
        for folder in [folder for at, folder in known if at <= step][: -self.keep] + broken:
            files.remove(folder)

    def _known(self) -> list[tuple[int, Path]]:
        try:
            return files.find(self.directory)
        except OSError:
            return []


def _values(variables: Sequence[Variable]) -> dict[str, tf.Tensor]:
    """As they are now, by name, in the memory of the host.

    On a CPU they are the variables' own memory: a variable that is changed while somebody holds its value moves to another.
    """
    with tf.device("CPU"):
        return {name: tf.identity(tf_variable(v).read_value()) for name, v in _named(variables).items()}


def _step_back() -> None:
    """Gives way to the threads that train, where the system knows a thread's own priority."""
    with contextlib.suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)


def _unnumbered(name: str) -> str:
    """A variable's name without the numbers that Keras counts up in a process."""
    return re.sub(r"_\d+(?=/|$)", "", name)


def _named(variables: Sequence[Variable]) -> dict[str, Variable]:
    """By name; where several have one, by number, too."""
    named: dict[str, Variable] = {}
    for variable in variables:
        name, count = name_of(variable), 1
        while name in named:
            count += 1
            name = f"{name_of(variable)}#{count}"
        named[name] = variable
    return named
