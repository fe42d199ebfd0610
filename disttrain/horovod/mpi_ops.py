"""Horovod's own ops and what it says of ranks, as they are: for scripts that import `horovod.tensorflow.mpi_ops`."""

from __future__ import annotations

from typing import Any

from disttrain.horovod.engine import hvd


def __getattr__(name: str) -> Any:
    return getattr(hvd.mpi_ops, name)


def __dir__() -> list[str]:
    return dir(hvd.mpi_ops)
