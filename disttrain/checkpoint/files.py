"""A checkpoint on disk: a folder that appears under its name when it is whole, with a checksum of everything in it.

The values are in TensorFlow's own format, so that `tf.train.load_checkpoint(folder / "variables")` reads them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from disttrain.errors import DataError

VARIABLES = "variables"
_STATE = "state.json"
_CHUNK = 1 << 22


def write(folder: Path, values: Mapping[str, np.ndarray], state: dict[str, Any]) -> None:
    """Writes a checkpoint under a temporary name, and gives it its own when it is on the disk.

    Raises:
      OSError: it cannot be written; nothing of it is left then, and what was there before is as it was.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        names = list(values)
        try:
            tf.raw_ops.SaveV2(
                prefix=str(partial / VARIABLES),
                tensor_names=names,
                shape_and_slices=[""] * len(names),
                tensors=[tf.constant(values[name]) for name in names],
            )
        except tf.errors.OpError as error:
            raise OSError(re.sub(r"^\{\{.*?\}\} | \[Op:\w+\].*", "", error.message.splitlines()[0])) from error
        files = {path.name: _checksum(path) for path in sorted(partial.iterdir())}
        content = json.dumps({"state": state, "files": files}, sort_keys=True)
        text = json.dumps({"checksum": hashlib.sha256(content.encode()).hexdigest(), "content": content})
        (partial / _STATE).write_text(text)
        for path in (*partial.iterdir(), partial):
            _sync(path)
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():  # of the same step: it goes when the new one has its name
            folder.rename(old)
        partial.rename(folder)
        _sync(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def read_state(folder: Path) -> dict[str, Any]:
    """What `write` was given as `state`, after a look at every byte of the checkpoint.

    Raises:
      DataError: something is missing or has changed since it was written.
    """
    try:
        whole = json.loads((folder / _STATE).read_text())
        content = whole["content"]
        if hashlib.sha256(content.encode()).hexdigest() != whole["checksum"]:
            raise DataError(f"{folder / _STATE} has changed since it was written")
        content = json.loads(content)
        for name, checksum in content["files"].items():
            if _checksum(folder / name) != checksum:
                raise DataError(f"{folder / name} has changed since it was written")
    except (OSError, ValueError, LookupError, TypeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{folder} is not a whole checkpoint ({error})") from error
    return content["state"]


def read_values(folder: Path) -> dict[str, np.ndarray]:
    """Name -> value."""
    reader = tf.train.load_checkpoint(str(folder / VARIABLES))
    return {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}


def _checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
