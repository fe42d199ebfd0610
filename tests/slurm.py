"""A real Slurm on one machine: two nodes, which are the hosts of `lab`, and all its daemons from Debian's packages.

Needs what `lab` needs, slurm-wlm and munge; with libpmix-dev `srun` speaks PMIx. `why_not()` says what is missing.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import lab

_DAEMONS = ("munged", "slurmctld", "slurmscriptd", "slurmd")
_BIN = Path(sys.executable).parent
_CONF = """
ClusterName=disttrain
SlurmctldHost={first}
SlurmUser=root
SlurmdUser=root
# How long a requeued job waits, too.
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/%n/pid
SlurmdLogFile={folder}/%n/log
SlurmdSpoolDir={folder}/%n/spool
TmpFS={folder}/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,batch_sched_delay=0
KillWait=10
MpiDefault=none
ReturnToService=2
NodeName={names} CPUs=4 RealMemory=4000 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES State=UP
"""


def why_not() -> str | None:
    """Why there can be no Slurm here; None if there can."""
    missing = [name for name in ("slurmctld", "slurmd", "munged", "sbatch") if not _which(name)]
    if missing:
        return f"not installed: {', '.join(missing)} (Debian: apt-get install slurm-wlm munge libpmix-dev)"
    return lab.why_not()


class Slurm:
    """A cluster of two nodes, h1 and h2; its commands run on h1. A context manager."""

    def __init__(self) -> None:
        self.hosts = lab.Lab(2)
        self._folder = Path(tempfile.mkdtemp(prefix="disttrain-slurm-"))
        self._daemons: list[subprocess.Popen] = []

    def __enter__(self) -> Slurm:
        self.hosts.__enter__()
        try:
            self._write_files()
            self._start("h1", "munged", "--foreground", "--force", *self._munge_options(), ready="munge/socket")
            self._start("h1", "slurmctld", "-D", ready="slurmctld.pid")
            for name in self.hosts.names:
                self._start(name, "slurmd", "-D", "-N", name, ready=f"{name}/pid")
            self._wait_until_idle()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.hosts.__exit__()  # ends whatever runs on them
        for daemon in self._daemons:
            daemon.kill()
            daemon.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def do(self, *command: str, seconds: float = 60, check: bool = True, **environment: str) -> str:
        """What a command says on h1, stdout and stderr together."""
        done = subprocess.run(
            self.hosts.on("h1", *command),
            env=self._environment(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
            check=False,
        )
        assert done.returncode == 0 or not check, f"{' '.join(command)}: {done.stdout}"
        return done.stdout

    def submit(self, *words: str, **environment: str) -> int:
        """`sbatch` with these words; the job's number."""
        return int(re.search(r"Submitted batch job (\d+)", self.do("sbatch", *words, **environment))[1])

    def job(self, number: int) -> dict[str, str]:
        """What `scontrol show job` says."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.do("scontrol", "show", "job", str(number))))

    def wait_for_state(self, number: int, *states: str, seconds: float = 60) -> dict[str, str]:
        """Waits until the job is in one of the states; what is said of it then."""
        until = time.monotonic() + seconds
        while (found := self.job(number))["JobState"] not in states:
            assert time.monotonic() < until, f"{found['JobState']}, not {', '.join(states)}\n{self.logs()}"
            time.sleep(0.3)
        return found

    def left(self, seconds: float = 10) -> dict[str, dict[int, str]]:
        """Processes of jobs, those of Slurm's own for each job included, that are there after so many seconds."""
        until = time.monotonic() + seconds
        while True:
            found = {name: self._of_jobs(name) for name in self.hosts.names}
            found = {name: processes for name, processes in found.items() if processes}
            if not found or time.monotonic() > until:
                return found
            time.sleep(0.2)

    def logs(self) -> str:
        """The last lines of the daemons."""
        paths = [self._folder / "slurmctld.log", *(self._folder / name / "log" for name in self.hosts.names)]
        return "\n".join(line for path in paths if path.exists() for line in path.read_text().splitlines()[-15:])

    def _of_jobs(self, name: str) -> dict[int, str]:
        processes = self.hosts.processes(name).items()
        return {pid: line for pid, line in processes if Path(line.split(" ")[0].rstrip(":")).name not in _DAEMONS}

    # Setting up --------------------------------------------------------------------------------------------------------

    def _write_files(self) -> None:
        for name in ("munge", "state", *self.hosts.names):
            (self._folder / name).mkdir(mode=0o700)
        (self._folder / "munge").chmod(0o711)  # munged wants its socket in reach of all
        key = self._folder / "munge" / "key"
        key.write_bytes(secrets.token_bytes(64))
        key.chmod(0o600)
        names = ",".join(self.hosts.names)
        (self._folder / "slurm.conf").write_text(_CONF.format(folder=self._folder, first="h1", names=names))

    def _munge_options(self) -> list[str]:
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        return [f"--{option}={self._folder}/munge/{name}" for option, name in files.items()]

    def _start(self, host: str, name: str, *options: str, ready: str) -> None:
        daemon = subprocess.Popen(
            self.hosts.on(host, _which(name), *options),
            env=self._environment({}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._daemons.append(daemon)
        until = time.monotonic() + 20
        while not (self._folder / ready).exists():
            assert daemon.poll() is None, f"{name} has ended\n{self.logs()}"
            assert time.monotonic() < until, f"{name} does not come up\n{self.logs()}"
            time.sleep(0.05)

    def _wait_until_idle(self) -> None:
        until = time.monotonic() + 30
        while (states := self.do("sinfo", "-h", "-N", "-o", "%T", check=False).split()) != ["idle"] * 2:
            assert time.monotonic() < until, f"nodes are {states}\n{self.logs()}"
            time.sleep(0.2)

    def _environment(self, more: dict[str, str]) -> dict[str, str]:
        # As from a shell in which nothing is activated, and with no GPU: all hosts have the same ones.
        path = os.environ["PATH"].replace(f"{_BIN}{os.pathsep}", "")
        settings = {"SLURM_CONF": f"{self._folder}/slurm.conf", "PATH": f"{path}:/usr/sbin:/sbin"}
        return os.environ | settings | {"CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "3"} | more


def _which(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
