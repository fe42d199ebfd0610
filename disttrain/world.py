"""Which of how many ranks this process is, as whatever started it says in the environment; and what a rank's part is."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from disttrain.errors import BackendError

# What `disttrain run` sets for ranks: how many there are, and a file descriptor that takes JSON lines, of rank and progress.
WORLD_SIZE = "DISTTRAIN_WORLD_SIZE"
PROGRESS_FD = "DISTTRAIN_PROGRESS_FD"
# Set for a rank that is started when its job was asked to end already.
ASKED = "DISTTRAIN_ASKED_TO_END"


class World(NamedTuple):
    """A process among those that were started together.

    Attributes:
      launcher: what has started it, for a person.
      rank: 0 to size - 1.
      size: number of processes.
      local_rank: of this process among those of its machine.
      collectives: whether it can talk to the others by Horovod or MPI.
    """

    launcher: str
    rank: int
    size: int
    local_rank: int
    collectives: bool


# In this order: what is started by mpirun or torchrun inside a Slurm step finds the variables of both.
# Name, then the variables of rank, size and local rank, and whether the launcher connects Horovod or MPI.
_LAUNCHERS = (
    ("horovodrun", "HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_LOCAL_RANK", True),
    ("mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", True),
    ("mpiexec", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", True),
    ("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", False),
    ("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", False),
)


def world(environment: Mapping[str, str] = os.environ) -> World | None:
    """What the environment says; None where no launcher has started this process.

    Known are horovodrun, mpirun, other launchers with PMI, srun (with and without PMIx), torchrun and what sets the same
    variables, and the Indexed Job of Kubernetes (JOB_COMPLETION_INDEX with DISTTRAIN_HOSTS).

    Raises:
      BackendError: a variable of theirs is not a number.
    """
    for name, rank, size, local_rank, collectives in _LAUNCHERS:
        if rank in environment and size in environment:
            # Open MPI under srun gives a rank, but not always one on its machine; Slurm then has it.
            local = local_rank if local_rank in environment else "SLURM_LOCALID"
            by_pmix = name == "srun" and "PMIX_RANK" in environment
            numbers = (_number(environment, key) for key in (rank, size, local))
            return World("srun --mpi=pmix" if by_pmix else name, *numbers, collectives or by_pmix)
    if "JOB_COMPLETION_INDEX" in environment and environment.get("DISTTRAIN_HOSTS"):
        hosts = environment["DISTTRAIN_HOSTS"].split(",")
        return World("an Indexed Job", _number(environment, "JOB_COMPLETION_INDEX"), len(hosts), 0, False)
    return None


def elastic_job(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether Horovod's elastic driver has started this process, and ranks may come and go."""
    return environment.get("HOROVOD_ELASTIC", "0") not in ("", "0")


def tell_launcher(message: Mapping[str, Any]) -> None:
    """A line for `disttrain run`, where that has started this process: progress, or another rank in an elastic job."""
    if PROGRESS_FD in os.environ:
        with contextlib.suppress(OSError):
            os.write(int(os.environ[PROGRESS_FD]), json.dumps(message).encode() + b"\n")


def cuts(count: int, parts: int) -> list[int]:
    """Where `parts` ranks cut `count` things: consecutive parts whose sizes differ by one at most, the larger ones first."""
    small, larger = divmod(count, parts)
    return [part * small + min(part, larger) for part in range(parts + 1)]


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "0")
    if not text.isdigit():
        raise BackendError(f"{name}={text!r}: the launcher's variable should be a whole number")
    return int(text)
