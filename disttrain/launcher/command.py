"""The command line that starts the ranks, and what people forget to set around it."""

from __future__ import annotations

import contextlib
import os
import random
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from disttrain.errors import BackendError, ConfigError
from disttrain.interfaces import towards
from disttrain.launcher.discovery import Elastic
from disttrain.launcher.hosts import Host, is_local, read_hostfile, ssh_agent

LAUNCHERS = ("auto", "local", "horovodrun", "mpirun", "srun")

# Variables with these beginnings travel to ranks on other hosts, where ssh and Open MPI would leave them behind.
_TRAVELS = (
    "CUDA_", "CUBLAS_", "DISTTRAIN_", "HOROVOD_", "KERAS_", "LD_LIBRARY_PATH", "MKL_", "NCCL_", "OMP_", "OMPI_MCA_", "PATH",
    "PYTHON", "TF_", "UCX_", "VIRTUAL_ENV", "XLA_",
)  # fmt: skip

# Where it takes a host away, Horovod's driver waits from twice the first on, up to the second, before it starts ranks there.
_COOLDOWN_SECONDS = ("5", "300")


class Job(NamedTuple):
    """What is to be started.

    Attributes:
      program: the words of its command line, the first an absolute path.
      ranks: how many.
      hosts: where; empty where the launcher knows (this machine alone, or Slurm's allocation).
      launcher: one of `LAUNCHERS` but "auto".
      interface: name of the network interface between hosts; None: the one that leads to the first other host.
      names: of variables that ranks on other hosts get besides those that are known to matter.
      elastic: how many ranks there may be and where, if hosts come and go.
    """

    program: list[str]
    ranks: int
    hosts: list[Host]
    launcher: str
    interface: str | None = None
    names: tuple[str, ...] = ()
    elastic: Elastic | None = None

    @property
    def survives(self) -> bool:
        """Whether the ranks that are left go on when one is lost: with Horovod's elastic driver."""
        return self.elastic is not None and self.launcher == "horovodrun"

    @property
    def others(self) -> list[Host]:
        """Hosts other than this machine."""
        return [host for host in self.hosts if not is_local(host.name)]


class Command(NamedTuple):
    """One process to start.

    Attributes:
      words: the command line.
      environment: what is set for it besides what is set already.
    """

    words: list[str]
    environment: dict[str, str]

    def __str__(self) -> str:
        return " \\\n  ".join(
            [*(f"{name}={shlex.quote(x)}" for name, x in self.environment.items()), shlex.join(self.words)]
        )


def choose_hosts(text: list[Host] | None, hostfile: str | None) -> list[Host]:
    """The hosts that were named; else those of MPI Operator, which Open MPI 5 itself does not find.

    The operator says OMPI_MCA_orte_default_hostfile, a name of Open MPI 4.
    """
    if text and hostfile:
        raise ConfigError("-H and --hostfile: give one of the two")
    hostfile = hostfile or (None if text else os.environ.get("OMPI_MCA_orte_default_hostfile"))
    return read_hostfile(hostfile) if hostfile else (text or [])


def choose_launcher(wanted: str, hosts: list[Host], *, elastic: bool = False) -> str:
    """What "auto" means here: srun in Slurm's allocation, else mpirun where it is installed, else what else is there.

    For an elastic job horovodrun comes first: there ranks survive the loss of others.

    Raises:
      BackendError: the launcher is not installed, or cannot do what is asked for.
    """
    in_slurm = "SLURM_JOB_ID" in os.environ and which("srun") is not None
    if wanted == "auto":
        several = any(not is_local(host.name) for host in hosts)
        names = ("horovodrun", "mpirun") if elastic else ("mpirun", "horovodrun")
        found = [name for name in names if which(name)]
        wanted = "srun" if in_slurm and not hosts else next(iter(found), "mpirun" if several else "local")
    if wanted == "local" and any(not is_local(host.name) for host in hosts):
        raise BackendError("--launcher local starts ranks on this machine alone: use mpirun or horovodrun for -H")
    if wanted == "srun" and "SLURM_JOB_ID" not in os.environ:
        raise BackendError(
            "--launcher srun: there is no Slurm allocation here: use it in a script for sbatch, or in salloc"
        )
    if wanted != "local" and which(wanted) is None:
        mend = {
            "mpirun": "pip install 'disttrain[mpi]' brings Open MPI",
            "horovodrun": "`disttrain build-horovod` installs it",
            "srun": "install Slurm's client",
        }[wanted]
        raise BackendError(f"there is no {wanted} here: {mend}")
    return wanted


def resolve(program: list[str]) -> list[str]:
    """The program by an absolute path: other hosts, reached by ssh, may have another PATH or none.

    Raises:
      ConfigError: it is not found.
    """
    first, *rest = program
    if first in ("python", "python3"):
        return [sys.executable, *rest]
    if first.endswith(".py") and Path(first).is_file() and not os.access(first, os.X_OK):
        return [sys.executable, str(Path(first).absolute()), *rest]
    found = which(first)
    if found is None:
        raise ConfigError(
            f"there is no program {first!r}: write what you would type without `disttrain run`, as python train.py"
        )
    return [found, *rest]


def which(name: str) -> str | None:
    """Absolute path of a program; the one that belongs to this Python before those of PATH."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    return found and os.path.abspath(found)


def commands(job: Job, environment: dict[str, str]) -> list[Command]:
    """The processes to start: one launcher, or with "local" every rank by itself.

    Args:
      environment: set for the ranks, by name.
    """
    agent = [sys.executable, "-m", "disttrain.launcher.agent", *job.program]
    return {"local": _local, "mpirun": _mpirun, "horovodrun": _horovodrun, "srun": _srun}[job.launcher](
        job, agent, environment
    )


def _local(job: Job, agent: list[str], environment: dict[str, str]) -> list[Command]:
    # In the words of torchrun.
    shared = {"WORLD_SIZE": str(job.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    return [
        Command(agent, environment | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(job.ranks)
    ]


def _free_port() -> int:
    """A port whose successor is free, where ranks meet; below those that the kernel gives to whoever connects."""
    while True:
        port = random.SystemRandom().randrange(20000, 32000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port + 1)):
            return port


def _mpirun(job: Job, agent: list[str], environment: dict[str, str]) -> list[Command]:
    settings = _open_mpi(job)
    # What is set already wins: the user knows better.
    settings = {name: os.environ.get(name, value) for name, value in settings.items()}
    # A rank has threads of its own, and Open MPI would bind all of them to one core; TensorFlow's number is set by the ranks.
    words = [which("mpirun"), "-np", str(job.ranks), "--bind-to", "none", "--map-by", "slot:OVERSUBSCRIBE"]
    if job.hosts:
        words += ["--host", ",".join(f"{host.name}:{host.slots}" for host in job.hosts)]
    if job.others:
        words += ["--wdir", str(Path.cwd())]
        travels = {name for name in {**os.environ, **environment, **settings} if name.startswith(_TRAVELS)}
        words += [word for name in sorted(travels.union(job.names)) for word in ("-x", name)]
    return [Command([*words, *agent], environment | settings)]


def _open_mpi(job: Job) -> dict[str, str]:
    """For mpirun and for the ranks' MPI library, which both read their settings from the environment."""
    settings = {
        # By itself it notices a cut link after minutes, or never.
        "PRTE_MCA_oob_tcp_keepalive_time": "5",
        "PRTE_MCA_oob_tcp_keepalive_intvl": "2",
        "PRTE_MCA_oob_tcp_keepalive_probes": "3",
        # Ranks that wait give their core away: where there are more ranks than cores nothing moves otherwise.
        "OMPI_MCA_mpi_yield_when_idle": "1",
    }
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        settings |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    if job.others:
        settings |= {
            "PRTE_MCA_plm_ssh_agent": shlex.join(ssh_agent()),
            # Its own choice sends three times as many bytes over a link as a ring does.
            "OMPI_MCA_coll_tuned_use_dynamic_rules": "1",
            "OMPI_MCA_coll_tuned_dynamic_rules_filename": str(Path(__file__).with_name("ring.rules")),
        }
        if "OMPI_MCA_plm_rsh_args" in os.environ:  # MPI Operator, in the words of Open MPI 4
            settings["PRTE_MCA_plm_ssh_args"] = os.environ["OMPI_MCA_plm_rsh_args"]
        interface = towards(job.others[0].name, job.interface)
        if interface:
            # The network, not the name, which may be another on every host.
            settings |= {
                "OMPI_MCA_btl_tcp_if_include": str(interface.network),
                "PRTE_MCA_prte_if_include": str(interface.network),
            }
    return settings | _nccl(job)


def _nccl(job: Job) -> dict[str, str]:
    return {"NCCL_SOCKET_IFNAME": job.interface} if job.interface else {}


def _horovodrun(job: Job, agent: list[str], environment: dict[str, str]) -> list[Command]:
    hosts = job.hosts or [Host("localhost", job.ranks)]
    program = [sys.executable, "-m", "disttrain.launcher.driver"] if job.elastic else [which("horovodrun")]
    words = [*program, "--gloo", "-np", str(job.ranks)]
    settings = _nccl(job)
    if job.elastic:
        words += _membership(job.elastic)
        # What it says of a lost connection, in every rank that survives, is no error there.
        settings["HOROVOD_LOG_LEVEL"] = os.environ.get("HOROVOD_LOG_LEVEL", "fatal")
    else:
        words += ["-H", ",".join(f"{host.name}:{host.slots}" for host in hosts)]
    interface = _interface(job)
    if interface:
        words += ["--network-interface", interface]
    if job.others or job.elastic:
        settings["PATH"] = f"{Path(__file__).with_name('bin')}{os.pathsep}{os.environ['PATH']}"
    return [Command([*words, *agent], environment | settings)]


def _membership(elastic: Elastic) -> list[str]:
    """A host on which all ranks have failed is tried again later: in Kubernetes a new pod has the old one's name."""
    words = ["--min-np", str(elastic.least), "--max-np", str(elastic.most), "--slots-per-host", str(elastic.slots)]
    return [*words, "--host-discovery-script", elastic.script, "--blacklist-cooldown-range", *_COOLDOWN_SECONDS]


def _interface(job: Job) -> str | None:
    if job.others:
        found = towards(job.others[0].name, job.interface)
        return found and found.name
    # Horovod's elastic driver would ask two hosts for one that they share, and wait for the second.
    return (job.interface or "lo") if job.elastic else None


def _srun(job: Job, agent: list[str], environment: dict[str, str]) -> list[Command]:
    # How the job has failed is judged here, by the rank that failed first; Slurm would kill the others in mid-sentence.
    words = [which("srun"), "-n", str(job.ranks), "--kill-on-bad-exit=0", "--export=ALL", "--cpu-bind=none"]
    if "pmix" in _output_of(words[0], "--mpi=list"):
        words += ["--mpi=pmix"]
    return [Command([*words, *agent], environment | _open_mpi(job))]


def _output_of(*words: str) -> str:
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=20, check=False)
    return done.stdout
