"""What a rank of a test says to the test that has started it. Import it first: it writes down the process's id."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

_FOLDER = Path(os.environ["REPORT_DIR"])
BACKEND = os.environ["BACKEND"]


def _rank() -> int:
    for name in ("HOROVOD_RANK", "OMPI_COMM_WORLD_RANK"):
        if name in os.environ:
            return int(os.environ[name])
    return json.loads(os.environ["TF_CONFIG"])["task"]["index"]


RANK = _rank()


def report(**values: Any) -> None:
    """Leaves values (JSON) for `Result.reports[rank]`. The last call counts."""
    _write(f"{RANK}.json", json.dumps(values).encode())


def arrays(**values: Any) -> None:
    """Leaves arrays for `Result.arrays[rank]`. The last call counts."""
    partial = _FOLDER / f"{RANK}.partial.npz"
    np.savez(partial, **values)
    partial.rename(_FOLDER / f"{RANK}.npz")


def mark(name: str) -> None:
    """Says that this rank has come to a place, for `Job.wait_for_mark(rank, name)`."""
    _write(f"{RANK}.{name}.mark", b"")


def _write(name: str, data: bytes) -> None:
    partial = _FOLDER / f"{name}.partial"
    partial.write_bytes(data)
    partial.rename(_FOLDER / name)


_write(f"{RANK}.pid", str(os.getpid()).encode())
