"""A checkpoint on disk: a folder that appears under its name when it is whole, with a checksum of everything in it.

The values are in TensorFlow's own format, so that `tf.train.load_checkpoint(folder / "variables")` reads them. It keeps a
checksum of every value in its index, made as the value is written; the index and what is saved beside the values have theirs
in `state.json`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tensorflow as tf

from disttrain.errors import DataError

VARIABLES = "variables"
_STATE = "state.json"
_CHUNK = 1 << 22
_DAMAGED = (tf.errors.DataLossError, tf.errors.NotFoundError, tf.errors.OutOfRangeError)
_being_written: set[Path] = set()


def write(folder: Path, values: Mapping[str, tf.Tensor], state: dict[str, Any]) -> None:
    """Writes a checkpoint under a temporary name, and gives it its own when it is on the disk.

    Raises:
      OSError: it cannot be written; nothing of it is left then, and what was there before is as it was.
    """
    partial, old = _partial(folder), _old(folder)
    _being_written.add(partial)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        with _os_errors():
            tf.raw_ops.SaveV2(
                prefix=str(partial / VARIABLES),
                tensor_names=list(values),
                shape_and_slices=[""] * len(values),
                tensors=list(values.values()),
            )
        paths = sorted(partial.iterdir())
        content = {
            "state": state,
            "files": {path.name: _checksum(path) for path in paths if path.suffix == ".index"},
            "sizes": {path.name: path.stat().st_size for path in paths},
        }
        content = json.dumps(content, sort_keys=True)
        text = json.dumps({"checksum": hashlib.sha256(content.encode()).hexdigest(), "content": content})
        (partial / _STATE).write_text(text)
        for path in (*partial.iterdir(), partial):
            _sync(path)
        if folder.exists():  # of the same step: it goes when the new one has its name
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        partial.rename(folder)
        _sync(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        _being_written.discard(partial)


def remove(folder: Path) -> None:
    """Under another name first: should this process be killed now, what is left must not look like a checkpoint."""
    gone = folder.with_name(f".{folder.name.strip('.').removesuffix('.old')}.gone")
    shutil.rmtree(gone, ignore_errors=True)
    with contextlib.suppress(OSError):
        folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def find(directory: Path) -> list[tuple[int, Path]]:
    """Checkpoints by step, whole or damaged; also those that a process was about to replace when it was killed."""
    found: dict[int, Path] = {}
    # In this order: where there is one under its own name, that one is meant.
    for pattern in (r"\.step-(\d+)\.old", r"step-(\d+)"):
        for folder in directory.iterdir() if directory.is_dir() else ():
            if match := re.fullmatch(pattern, folder.name):
                found[int(match[1])] = folder
    return sorted(found.items())


def tidy(directory: Path) -> None:
    """Takes away what processes that were killed have left behind, but for what this one is writing."""
    for left in (*directory.glob(".step-*.partial"), *directory.glob(".step-*.gone")):
        if left not in _being_written:
            shutil.rmtree(left, ignore_errors=True)
    for old in directory.glob(".step-*.old"):
        folder = old.with_name(old.name[1:].removesuffix(".old"))
        if _partial(folder) in _being_written:
            continue
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(folder)


def read_state(folder: Path) -> dict[str, Any]:
    """What `write` was given as `state`, after a look at every byte of the checkpoint.

    Raises:
      DataError: something is missing or has changed since it was written.
      OSError: it cannot be read now, which does not mean that it is damaged.
    """
    try:
        whole = json.loads((folder / _STATE).read_text())
        content = whole["content"]
        if hashlib.sha256(content.encode()).hexdigest() != whole["checksum"]:
            raise DataError(f"{folder / _STATE} has changed since it was written")
        content = json.loads(content)
        for name, size in content.get("sizes", {}).items():
            if (folder / name).stat().st_size != size:
                raise DataError(f"{folder / name} has changed since it was written")
        for name, checksum in content["files"].items():
            if _checksum(folder / name) != checksum:
                raise DataError(f"{folder / name} has changed since it was written")
        for _ in _values(folder):
            pass
    except (FileNotFoundError, NotADirectoryError, ValueError, LookupError, TypeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{folder} is not a whole checkpoint ({error})") from error
    return content["state"]


def read_values(folder: Path) -> dict[str, tf.Tensor]:
    """Name -> value. Raises what `read_state` raises."""
    return dict(_values(folder))


def _values(folder: Path) -> Iterator[tuple[str, tf.Tensor]]:
    """One after the other; TensorFlow compares each with its checksum."""
    prefix = str(folder / VARIABLES)
    with _os_errors(), tf.device("CPU"):
        try:
            for name, dtype in sorted(tf.train.load_checkpoint(prefix).get_variable_to_dtype_map().items()):
                yield (
                    name,
                    tf.raw_ops.RestoreV2(prefix=prefix, tensor_names=[name], shape_and_slices=[""], dtypes=[dtype])[0],
                )
        except _DAMAGED as error:
            raise DataError(f"{folder / VARIABLES} has changed since it was written ({_said(error)})") from error


def _partial(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.partial")


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


@contextlib.contextmanager
def _os_errors() -> Iterator[None]:
    """What TensorFlow says of files, as Python says it."""
    try:
        yield
    except tf.errors.OpError as error:
        raise OSError(_said(error)) from error


def _said(error: tf.errors.OpError) -> str:
    """Without the name of the op around it."""
    return re.sub(r"^\{\{.*?\}\} | \[Op:\w+\].*", "", error.message.splitlines()[0])


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
