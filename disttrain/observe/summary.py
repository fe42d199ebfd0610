"""`summary.json`: what a run was, and what came of it."""

from __future__ import annotations

import json
import platform
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import disttrain
from disttrain.errors import DataError


def write_summary(folder: Path, content: dict[str, Any]) -> Path:
    """Writes `content` with the command line and the versions before it; returns the file's path.

    Raises:
      DataError: the folder cannot be written to.
    """
    libraries = ("tensorflow", "keras", "numpy")
    versions = {"disttrain": disttrain.__version__, "python": platform.python_version()}
    versions |= {name: version(name) for name in libraries}
    path = folder / "summary.json"
    try:
        path.write_text(json.dumps({"command": sys.argv, "versions": versions, **content}, indent=2) + "\n")
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}") from error
    return path


def make_folder(path: Path) -> Path:
    """Makes a folder for results, early, so that a run does not fail at its end.

    Raises:
      DataError: it cannot be made or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):  # of its own for each rank
            pass
    except OSError as error:
        raise DataError(f"cannot write to the folder {path}: {error.strerror}; choose another with --out") from error
    return path
