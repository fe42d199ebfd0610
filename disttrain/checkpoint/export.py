"""A trained model for others to use: a Keras file, or TensorFlow's SavedModel."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import keras

from disttrain.errors import DataError


def export(model: keras.Model, path: Path) -> None:
    """Writes to `path`, which is as it was until all is written: ".keras", or a SavedModel folder with an endpoint `serve`.

    Raises:
      DataError: it cannot be written.
    """
    partial = path.with_name(f".partial-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".keras":
            model.save(partial)
            os.replace(partial, path)
            return
        model.export(partial, verbose=False)
        shutil.rmtree(path, ignore_errors=True)
        partial.rename(path)
    except OSError as error:
        raise DataError(
            f"cannot write {path} ({error.strerror or error}): make room, or choose another place"
        ) from error
