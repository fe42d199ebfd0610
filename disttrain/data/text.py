"""Bytes of text as training examples for a language model."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import numpy as np

from disttrain.errors import DataError

_HELD_OUT = 0.05


def read(path: Path | None = None) -> np.ndarray:
    """The bytes of a text file, uint8 [n]; by default of the sources of Python's standard library, some 10 MB.

    Raises:
      DataError: the file is missing, unreadable or empty.
    """
    if path is None:
        return _standard_library()
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read the text {path}: {error.strerror}") from error
    if not content:
        raise DataError(f"the text {path} is empty")
    return np.frombuffer(content, np.uint8)


def windows(text: np.ndarray, length: int, limit: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Cuts text into consecutive pieces of `length` bytes: (inputs, the bytes that follow), int32 [n, length] each.

    Raises:
      DataError: the text is shorter than one piece.
    """
    count = (len(text) - 1) // length
    if count < 1:
        raise DataError(f"the text has {len(text)} bytes; at least {length + 1} are needed")
    count = min(count, limit or count)
    inputs = text[: count * length].reshape(count, length)
    following = text[1 : count * length + 1].reshape(count, length)
    return inputs.astype("int32"), following.astype("int32")


def split(text: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The text, and its last twentieth to be held out."""
    cut = int(len(text) * (1 - _HELD_OUT))
    return text[:cut], text[cut:]


def _standard_library() -> np.ndarray:
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(p for p in root.rglob("*.py") if "site-packages" not in p.parts and "test" not in p.parts)
    if not files:
        raise DataError(f"no sources of the standard library in {root}: give a text with --text")
    return np.frombuffer(b"\n".join(p.read_bytes() for p in files), np.uint8)
