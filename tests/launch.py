"""Starts a script of `tests/ranks/` as several real processes, by each way in which disttrain can be started.

`launch` runs to the end; `start` leaves the job to the test meanwhile, to stop or kill a rank. Every process of a job
carries a token in its environment, by which it is found again however far it has moved from its parent.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

BACKEND = {"horovod": "horovod", "gloo": "horovod", "mpi": "mpi", "multiworker": "multiworker"}
ENGINES = tuple(BACKEND)

_TESTS = Path(__file__).parent
_BIN = Path(sys.executable).parent
# Processes that are on their way out when the launcher has gone already.
_LEAVING_SECONDS = 5


@dataclass
class Result:
    """What is left of a job.

    Attributes:
      returncode: of the launcher; of the first rank that failed where there is no launcher.
      seconds: from the start to the end of the last process that the test has started itself.
      output: stdout and stderr of all processes.
      reports: by rank, what the rank gave to `report`; None where it did not come to it.
      arrays: by rank, what the rank gave to `arrays`.
      left_behind: "name (pid)" of processes that outlived the launcher. They have been killed.
    """

    returncode: int
    seconds: float
    output: str
    reports: list[dict | None]
    arrays: list[dict[str, np.ndarray]]
    left_behind: list[str] = field(default_factory=list)

    def check(self) -> Result:
        """Asserts that all ranks came to their end, reported, and left nothing behind."""
        tail = "\n".join(self.output.splitlines()[-60:])
        assert self.returncode == 0, f"ended with {self.returncode}:\n{tail}"
        assert None not in self.reports, f"ranks without a report in {self.reports}:\n{tail}"
        assert not self.left_behind, f"left behind: {self.left_behind}\n{tail}"
        return self


def launch(engine: str, ranks: int, script: str, *args: Any, timeout: float = 120, env: dict | None = None) -> Result:
    """Runs `tests/ranks/SCRIPT.py` as `ranks` processes and returns what came of it.

    Args:
      engine: "horovod" (mpirun), "gloo" (horovodrun --gloo), "mpi" (mpirun) or "multiworker" (TF_CONFIG).
      args: for the script's sys.argv.
      env: environment variables for all ranks; None as a value takes one away.

    Raises:
      TimeoutError: it took longer; all its processes have been killed.
    """
    with start(engine, ranks, script, *args, env=env) as job:
        return job.wait(timeout)


def start(engine: str, ranks: int, script: str, *args: Any, env: dict | None = None) -> Job:
    """Like `launch`, but returns at once: `with start(...) as job: job.pid_of_rank(1); job.wait()`."""
    return Job(engine, ranks, [sys.executable, str(_TESTS / "ranks" / f"{script}.py"), *map(str, args)], env or {})


class Started(subprocess.Popen):
    """A process that does not outlive its `with` block: where a test fails in it, nothing waits for a job that nobody ends."""

    def __exit__(self, *exc: object) -> None:
        self.kill()
        super().__exit__(*exc)


class Job:
    """Processes on their way."""

    def __init__(self, engine: str, ranks: int, command: list[str], env: dict):
        self.ranks, self._token = ranks, f"DISTTRAIN_TEST_JOB={secrets.token_hex(8)}"
        self._folder = Path(tempfile.mkdtemp(prefix="disttrain-test-"))
        self._begun = time.monotonic()
        with (self._folder / "output").open("ab") as out:
            self._processes = [
                subprocess.Popen(
                    line,
                    env=self._environment(engine, env | more),
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
                for line, more in _commands(engine, ranks, command)
            ]

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *exc: object) -> None:
        self._kill(self._alive())
        for process in self._processes:
            process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def pid_of_rank(self, rank: int, timeout: float = 60) -> int:
        """Waits until the rank has started Python."""
        return int(self._when_written(f"{rank}.pid", timeout))

    def wait_for_mark(self, rank: int, name: str, timeout: float = 60) -> None:
        """Waits until the rank has called `mark(name)`."""
        self._when_written(f"{rank}.{name}.mark", timeout)

    def wait(self, timeout: float = 120) -> Result:
        """Waits for the end of what was started, and cleans up behind it."""
        until = self._begun + timeout
        try:
            for process in self._processes:
                process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            tail = self._output()[-4000:]
            raise TimeoutError(f"the job took more than {timeout:g} s; its output ends with:\n{tail}") from None
        seconds = time.monotonic() - self._begun
        while self._alive() and time.monotonic() - self._begun < seconds + _LEAVING_SECONDS:
            time.sleep(0.05)
        left = self._alive()
        self._kill(left)
        return Result(
            returncode=next((p.returncode for p in self._processes if p.returncode), 0),
            seconds=seconds,
            output=self._output(),
            reports=[self._report(rank) for rank in range(self.ranks)],
            arrays=[self._arrays(rank) for rank in range(self.ranks)],
            left_behind=[f"{name} ({pid})" for pid, name in left.items()],
        )

    def _environment(self, engine: str, env: dict) -> dict[str, str]:
        name, _, token = self._token.partition("=")
        whole = os.environ | {
            name: token,
            "REPORT_DIR": str(self._folder),
            "BACKEND": BACKEND[engine],
            "PATH": f"{_BIN}{os.pathsep}{os.environ.get('PATH', '')}",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(_TESTS), os.environ.get("PYTHONPATH")])),
            "PYTHONUNBUFFERED": "1",
            "TF_CPP_MIN_LOG_LEVEL": "3",
            # More ranks than GPUs, and the same on all machines.
            "CUDA_VISIBLE_DEVICES": "",
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        }
        return {k: v for k, v in (whole | env).items() if v is not None}

    def _alive(self) -> dict[int, str]:
        """Living processes that carry the token, with their names."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
                if state not in "ZX" and self._token.encode() in (folder / "environ").read_bytes().split(b"\0"):
                    found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:200]
        return found

    def _kill(self, pids: dict[int, str]) -> None:
        # Until none is left: one that is being killed may just have started another.
        while pids:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
            pids = self._alive()

    def _when_written(self, name: str, timeout: float) -> str:
        until = time.monotonic() + timeout
        while not (self._folder / name).exists():
            # The launcher counts by itself: while a program takes another's place, its environment is not to be read.
            over = all(process.poll() is not None for process in self._processes) and not self._alive()
            if time.monotonic() > until or over:
                raise AssertionError(f"{name} was not written; the output ends with:\n{self._output()[-4000:]}")
            time.sleep(0.02)
        return (self._folder / name).read_text()

    def _output(self) -> str:
        return (self._folder / "output").read_text(errors="replace")

    def _report(self, rank: int) -> dict | None:
        path = self._folder / f"{rank}.json"
        return json.loads(path.read_text()) if path.exists() else None

    def _arrays(self, rank: int) -> dict[str, np.ndarray]:
        path = self._folder / f"{rank}.npz"
        if not path.exists():
            return {}
        with np.load(path) as arrays:
            return dict(arrays)


def _commands(engine: str, ranks: int, command: list[str]) -> list[tuple[list[str], dict]]:
    """What is to be started, each with its own environment variables."""
    if engine == "multiworker":
        return [(command, {"TF_CONFIG": json.dumps(config)}) for config in tf_configs(ranks)]
    if engine == "gloo":
        return [([str(_BIN / "horovodrun"), "--gloo", "-np", str(ranks), "-H", f"localhost:{ranks}", *command], {})]
    # Unbound: several jobs share the cores, and Open MPI would bind them all to the first ones.
    mpirun = [str(_BIN / "mpirun"), "-np", str(ranks), "--map-by", ":OVERSUBSCRIBE", "--bind-to", "none"]
    return [([*mpirun, *command], {})]


def tf_configs(ranks: int) -> list[dict]:
    """A TF_CONFIG for each of the workers, on free ports of this machine."""
    workers = [f"127.0.0.1:{port}" for port in free_ports(ranks)]
    return [{"cluster": {"worker": workers}, "task": {"type": "worker", "index": i}} for i in range(ranks)]


def free_ports(count: int) -> list[int]:
    """Below the range from which the kernel takes ports for whoever connects, or it might give them away meanwhile."""
    with contextlib.ExitStack() as held:
        ports: list[int] = []
        while len(ports) < count:
            with contextlib.suppress(OSError):
                port = random.SystemRandom().randrange(20000, 32000)
                held.enter_context(socket.create_server(("127.0.0.1", port)))
                ports.append(port)
        return ports
