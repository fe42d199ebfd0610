"""Starts the processes of a benchmark."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from disttrain.errors import BackendError

_SECONDS = 1800


def run_ranks(ranks: int, module: str, arguments: list[str]) -> None:
    """Runs `python -m module arguments` in as many processes, under mpirun, and waits.

    Raises:
      BackendError: there is no mpirun, or it failed: with the last lines of what it said.
    """
    beside = Path(sys.executable).with_name("mpirun")
    mpirun = str(beside) if beside.exists() else shutil.which("mpirun")
    if mpirun is None:
        raise BackendError("there is no mpirun: pip install 'disttrain[mpi]' brings Open MPI")
    # Unbound: a rank has threads of its own, and Open MPI would give all of them one core.
    command = [
        mpirun,
        "--bind-to",
        "none",
        "--map-by",
        ":OVERSUBSCRIBE",
        "-np",
        str(ranks),
        sys.executable,
        "-m",
        module,
        *arguments,
    ]
    # Open MPI does not start as root unless it is told twice.
    allowed = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    with subprocess.Popen(
        command,
        env=os.environ | allowed,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as job:
        try:
            said, _ = job.communicate(timeout=_SECONDS)
        except BaseException:
            os.killpg(job.pid, signal.SIGTERM)
            raise
    if job.returncode:
        raise BackendError(f"mpirun ended with {job.returncode}: {' | '.join(said.strip().splitlines()[-8:])}")
